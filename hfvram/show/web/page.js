// Sliders on a scale of powers of two beside the fields that they fill, and the question in the address bar.
(() => {
  const tokens = (text) => {
    const found = /^\s*(\d+(?:\.\d+)?)\s*([km]?)\s*$/i.exec(text);
    return found ? Number(found[1]) * { "": 1, k: 1024, m: 1048576 }[found[2].toLowerCase()] : NaN;
  };
  const field = (slider) =>
    document.querySelector(`#${slider.dataset.for} input, #${slider.dataset.for} textarea`);
  document.addEventListener("input", (event) => {
    const slider = event.target;
    if (!slider.dataset || !slider.dataset.for) return;
    const target = field(slider);
    if (!target) return;
    target.value = String(Math.round(2 ** Number(slider.value)));
    slider.setAttribute("aria-valuetext", target.value);
    target.dispatchEvent(new Event("input", { bubbles: true }));
  });
  setInterval(() => {
    for (const slider of document.querySelectorAll("input[type=range][data-for]")) {
      const target = field(slider);
      const count = target ? tokens(target.value) : NaN;
      if (document.activeElement === slider) continue;
      if (!(count > 0)) {
        slider.value = slider.dataset.default;
        continue;
      }
      slider.value = String(Math.log2(count));
      slider.setAttribute("aria-valuetext", target.value);
    }
  }, 250);
  // on a narrow screen the answer stands below the form: bring it into sight when it comes
  const sight = new MutationObserver(() => {
    const first = document.querySelector("#verdict, #error");
    if (first && first !== sight.seen && innerWidth < 700) first.scrollIntoView({ block: "start" });
    sight.seen = first;
  });
  const start = setInterval(() => {
    const found = document.getElementById("found");
    if (!found) return;
    clearInterval(start);
    sight.observe(found.parentElement, { childList: true, subtree: true });
  }, 100);
  window.hfvram = {
    remember: () => {
      const link = document.getElementById("link");
      if (link) history.replaceState(null, "", link.getAttribute("href"));
    },
  };
})();
