// What scrolls sideways can be reached, and scrolled, by keyboard.
const scrolled = () => {
  for (const each of document.querySelectorAll(".table-wrapper, .formula, .highlight pre, .wide")) {
    if (each.scrollWidth > each.clientWidth) {
      each.tabIndex = 0;
    }
  }
};

// A figure with its spread, such as 58.2 ± 1.8, stands on one line.
const figures = () => {
  for (const each of document.querySelectorAll(".table-wrapper td")) {
    if (/^[-+]?\d/.test(each.textContent) && each.textContent.length < 30) {
      each.style.whiteSpace = "nowrap";
    }
  }
};

// What the theme leaves unsaid to those who hear the page.
const said = () => {
  for (const each of document.querySelectorAll(".caption[role=heading]")) {
    each.ariaLevel = "2";
  }
  for (const [place, name] of [[".sidebar-drawer", "All pages"], [".toc-drawer", "This page"]]) {
    document.querySelector(place)?.setAttribute("aria-label", name);
  }
};

addEventListener("DOMContentLoaded", said);
addEventListener("DOMContentLoaded", figures);
addEventListener("load", scrolled);
addEventListener("resize", scrolled);
