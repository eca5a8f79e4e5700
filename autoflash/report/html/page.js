"use strict";
// Clicking a heading sorts its table by that column: up, then down. Numbers by size, whatever
// follows them ("1.08x cudnn"); cells without a value stay last.
const value = (row, index) => {
  const text = row.cells[index].textContent.trim();
  const number = /^-?[\d.]+(e[+-]?\d+)?/i.exec(text);
  return text === "" ? null : number ? parseFloat(number[0]) : text.toLowerCase();
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const body = heading.closest("table").tBodies[0];
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of heading.parentElement.cells) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = Array.from(body.rows, (row) => [value(row, heading.cellIndex), row]);
    rows.sort(([a], [b]) =>
      a === null || b === null ? (a === null) - (b === null) : down ? compare(b, a) : compare(a, b));
    body.append(...rows.map(([, row]) => row));
  });
}
