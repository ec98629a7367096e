// SPDX-License-Identifier: Apache-2.0
// Typesets formulas with MathJax.
//
// Called as: node typeset_math.cjs FOLDER, where FOLDER holds MathJax. Reads a list of
// [TeX, is displayed] from standard input as JSON. Writes {formulas, css} as JSON: the HTML of each
// formula, and MathJax's whole stylesheet.
const { readFileSync } = require("node:fs");

async function main() {
  const MathJax = await require(`${process.argv[2]}/node-main.js`).init({
    loader: { load: ["input/tex-full", "adaptors/liteDOM", "output/chtml", "a11y/assistive-mml"] },
    chtml: { adaptiveCSS: false, fontURL: "mathjax" },
    startup: { typeset: false },
  });
  const adaptor = MathJax.startup.adaptor;
  const formulas = [];
  for (const [tex, display] of JSON.parse(readFileSync(0, "utf8"))) {
    formulas.push(adaptor.outerHTML(await MathJax.tex2chtmlPromise(tex, { display })));
  }
  const css = adaptor.textContent(MathJax.chtmlStylesheet());
  process.stdout.write(JSON.stringify({ formulas, css }));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
