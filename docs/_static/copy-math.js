// SPDX-License-Identifier: Apache-2.0
// A copied formula is its TeX source: $x^2$, or $$x^2$$ where it stands on a line of its own.
document.addEventListener("copy", (event) => {
  const selection = getSelection();
  if (selection.isCollapsed) return;
  const range = selection.getRangeAt(0).cloneRange();
  const around = (node) =>
    (node.nodeType === Node.ELEMENT_NODE ? node : node.parentElement)?.closest(".math");
  const [first, last] = [around(range.startContainer), around(range.endContainer)];
  if (first) range.setStartBefore(first);
  if (last) range.setEndAfter(last);
  const copy = range.cloneContents();
  const formulas = copy.querySelectorAll("mjx-container");
  if (!formulas.length) return;
  for (const formula of formulas) {
    const mark = formula.hasAttribute("display") ? "$$" : "$";
    const tex = formula.querySelector("annotation").textContent;
    formula.replaceWith(`${mark}${tex}${mark}`);
  }
  // Rendered for a moment, so that lines end where they do on the page.
  const box = document.createElement("div");
  box.style.cssText = "position: fixed; left: -200vw; white-space: pre-wrap";
  box.append(copy);
  document.body.append(box);
  event.clipboardData.setData("text/plain", box.innerText);
  box.remove();
  event.preventDefault();
});
