// What scrolls sideways can be reached, and scrolled, by keyboard.
const scrolled = () => {
  for (const each of document.querySelectorAll(".table-wrapper, .formula, .highlight pre, .wide")) {
    if (each.scrollWidth > each.clientWidth) {
      each.tabIndex = 0;
    }
  }
};
addEventListener("load", scrolled);
addEventListener("resize", scrolled);
