// SPDX-License-Identifier: Apache-2.0
// Search by section, while typing. The index (docs/_ext/section_search.py) and Sphinx's stemmer are
// loaded when somebody searches, by script tags, so that it works from a folder, too.
"use strict";

const MOST_HITS = 12;

/** Whether a word that is being typed has come to an ending of a stem: "clipp" of "clip". */
const isStemOf = (term, word) =>
  term.length >= 4 && word.length - term.length <= 3 && word.startsWith(term);

/** The sections that answer a query, best first: [section, score]. */
function findSections(query, index, stem) {
  const american = index.american.map(([from, to]) => [new RegExp(from), to.replaceAll("$", "$")]);
  const stopwords = new Set(index.stopwords);
  const reduce = (word) => stem(american.reduce((w, [from, to]) => w.replace(from, to), word));
  const words = query.toLowerCase().match(/[a-zα-ω0-9]+(?:[_.][a-z0-9]+)*/g) ?? [];
  const parts = words.flatMap((word) => (/[_.]/.test(word) ? [word, ...word.split(/[_.]/)] : [word]));
  const kept = parts.filter((word) => !stopwords.has(word));
  const asked = [...new Set(kept.length ? kept : parts)];
  const scores = new Map();
  asked.forEach((word, place) => {
    const found = new Map();
    const take = (term, share) => {
      const list = index.terms[term];
      for (let k = 0; list && k < list.length; k += 2)
        found.set(list[k], Math.max(found.get(list[k]) ?? 0, share * list[k + 1]));
    };
    const whole = /[_.]/.test(word) ? word : reduce(word);
    take(whole, 1);
    if (place === asked.length - 1 && word.length > 1)
      // it may not be typed to its end, in which case its stem may be shorter than what there is
      for (const term in index.terms)
        if (term !== whole && (term.startsWith(word) || isStemOf(term, word))) take(term, 0.5);
    for (const [section, score] of found) {
      const [sum, count] = scores.get(section) ?? [0, 0];
      scores.set(section, [sum + score, count + 1]);
    }
  });
  return [...scores]
    .map(([section, [sum, count]]) => [section, sum * (count / asked.length) ** 2])
    .sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

if (typeof module === "object") module.exports = { findSections };
else searchBySection();

function searchBySection() {
  const top = document.documentElement.dataset.content_root ?? "./";
  let ready;

  function load(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${top}_static/${name}`;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`${name} cannot be loaded`));
      document.head.append(script);
    });
  }
  const start = () =>
    (ready ??= load("base-stemmer.js")
      .then(() => load("english-stemmer.js"))
      .then(() => load("search-sections.js"))
      .then(() => {
        const stemmer = new EnglishStemmer();
        return (query) => findSections(query, window.searchSections, (word) => stemmer.stemWord(word));
      }));

  function show(list, hits) {
    list.replaceChildren(
      ...hits.slice(0, MOST_HITS).map(([number]) => {
        const [page, anchor, title, above, kind, text] = window.searchSections.sections[number];
        const link = document.createElement("a");
        link.href = `${top}${page}.html${anchor ? "#" + anchor : ""}`;
        const head = document.createElement("strong");
        head.textContent = title;
        const place = document.createElement("small");
        place.textContent = above && above !== title ? `${above} · ${kind}` : kind;
        const excerpt = document.createElement("span");
        excerpt.textContent = text;
        link.append(head, place, excerpt);
        const item = document.createElement("li");
        item.append(link);
        return item;
      }),
    );
  }

  for (const form of document.querySelectorAll("form.bd-search")) {
    const input = form.querySelector("input");
    const box = document.createElement("div");
    const status = document.createElement("p");
    const list = document.createElement("ul");
    box.className = "section-hits";
    status.setAttribute("role", "status");
    box.append(status, list);
    form.after(box);
    let asked = "";

    async function search() {
      const query = input.value.trim();
      asked = query;
      try {
        const find = await start();
        if (query !== asked) return; // typed on meanwhile
        const hits = query ? find(query) : [];
        show(list, hits);
        status.textContent = !query ? "" : hits.length ? `${hits.length} sections` : "No section has these words";
      } catch (error) {
        status.textContent = `The search does not work here: ${error.message}`;
      }
    }

    const links = () => [...list.querySelectorAll("a")];
    function move(step) {
      const all = links();
      const next = all.indexOf(document.activeElement) + step;
      if (next < 0) input.focus();
      else all[Math.min(next, all.length - 1)]?.focus();
    }
    input.addEventListener("input", search);
    input.addEventListener("focus", () => start().catch(() => {})); // said when it is used
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      search().then(() => links()[0]?.click());
    });
    for (const part of [form, box])
      part.addEventListener("keydown", (event) => {
        if (event.key === "ArrowDown") move(1);
        else if (event.key === "ArrowUp") move(-1);
        else return;
        event.preventDefault();
      });
    list.addEventListener("click", (event) => {
      // a section of this page: the dialog would stay over it
      if (event.target.closest("a")) form.closest("dialog")?.close();
    });
    const given = new URLSearchParams(location.search).get("q");
    if (given && location.pathname.endsWith("/search.html")) {
      input.value = given;
      search();
    }
  }
}
