// SPDX-License-Identifier: Apache-2.0
// Buttons that copy a text which the page holds, and say so. ClipboardJS comes with sphinx-copybutton.
document.addEventListener("DOMContentLoaded", () => {
  const say = (event, text) => {
    const status = event.trigger.nextElementSibling;
    status.textContent = text;
    setTimeout(() => (status.textContent = ""), 3000);
  };
  const buttons = new ClipboardJS("button.copy-text");
  buttons.on("success", (event) => say(event, "copied"));
  buttons.on("error", (event) => say(event, "the browser did not allow it"));
});
