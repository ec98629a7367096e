// SPDX-License-Identifier: Apache-2.0
// Sliders below an equation: its value at once, and its curve over the slider that was moved last.
// The function is translated from the equation that was checked; `f` is what it calls.
"use strict";

const CURVE = { width: 320, height: 150, left: 52, right: 312, top: 10, bottom: 122, points: 121 };

function playEquation(box) {
  const { body, values, sliders, simplex } = JSON.parse(box.dataset.play);
  const value = new Function("v", "f", body);
  const inputs = [...box.querySelectorAll("input[type=range]")];
  let moved = 0;

  const read = ([name, places], v) => places.reduce((part, place) => part[place], v[name]);

  function write([name, places], number, v) {
    if (!places.length) return void (v[name] = number);
    const last = places.at(-1);
    const row = places.slice(0, -1).reduce((part, place) => part[place], v[name]);
    if (simplex.includes(name)) {
      const rest = row.reduce((sum, x, place) => (place === last ? sum : sum + x), 0);
      row.forEach((x, place) => {
        if (place !== last) row[place] = (1 - number) * (rest > 0 ? x / rest : 1 / (row.length - 1));
      });
    }
    row[last] = number;
  }

  function at(slider, number) {
    const v = structuredClone(values);
    write(slider, number, v);
    return value(v, equationRuntime);
  }

  const short = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(5))) : String(x));

  function curve() {
    const input = inputs[moved];
    const [low, high] = [Number(input.min), Number(input.max)];
    const xs = Array.from({ length: CURVE.points }, (_, k) => low + ((high - low) * k) / (CURVE.points - 1));
    const ys = xs.map((x) => at(sliders[moved], x));
    const finite = ys.filter(Number.isFinite);
    const [least, most] = [Math.min(...finite), Math.max(...finite)];
    const across = (x) => CURVE.left + ((CURVE.right - CURVE.left) * (x - low)) / (high - low);
    const up = (y) =>
      most > least
        ? CURVE.bottom - ((CURVE.bottom - CURVE.top) * (y - least)) / (most - least)
        : (CURVE.bottom + CURVE.top) / 2;
    const line = xs.map((x, k) => [x, ys[k]]).filter(([, y]) => Number.isFinite(y));
    const path = line.map(([x, y]) => `${across(x).toFixed(1)} ${up(y).toFixed(1)}`).join("L");
    const [x, y] = [Number(input.value), value(values, equationRuntime)];
    const dot = Number.isFinite(y) ? `<circle cx="${across(x)}" cy="${up(y)}" r="4"/>` : "";
    const label = `${box.dataset.title}: ${short(y)} at ${input.getAttribute("aria-label")} ${short(x)}`;
    box.querySelector(".equation-curve").innerHTML =
      `<p>value <output aria-live="polite">${short(y)}</output></p>` +
      `<svg viewBox="0 0 ${CURVE.width} ${CURVE.height}" role="img"><title></title>` +
      `<path class="axis" d="M${CURVE.left} ${CURVE.top}V${CURVE.bottom}H${CURVE.right}"/>` +
      `<path class="line" d="M${path}"/>${dot}` +
      `<text x="${CURVE.left - 4}" y="${CURVE.top + 8}" text-anchor="end">${short(most)}</text>` +
      `<text x="${CURVE.left - 4}" y="${CURVE.bottom}" text-anchor="end">${short(least)}</text>` +
      `<text x="${CURVE.left}" y="${CURVE.bottom + 18}">${short(low)}</text>` +
      `<text x="${CURVE.right}" y="${CURVE.bottom + 18}" text-anchor="end">${short(high)}</text></svg>`;
    box.querySelector("title").textContent = label;
  }

  function show() {
    inputs.forEach((input, k) => {
      const number = read(sliders[k], values);
      input.value = number;
      input.nextElementSibling.value = short(number);
      input.closest("tr").classList.toggle("moved", k === moved);
    });
    curve();
  }

  inputs.forEach((input, k) =>
    input.addEventListener("input", () => {
      moved = k;
      write(sliders[k], Number(input.value), values);
      show();
    }),
  );
  show();
}

for (const box of document.querySelectorAll("details.equation-play")) {
  box.hidden = false;
  box.addEventListener("toggle", () => playEquation(box), { once: true });
}
