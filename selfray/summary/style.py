"""The page's style sheet and script, inline in every summary."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --ink: #1c1b19; --muted: #625f59; --rule: #dcd8d0; --wash: #f4f1eb;
  --link: #005a94; --warn: #7a4b00; --warn-wash: #fdf1d8;
  --leak: #a3001b; --leak-wash: #fdeaea;
  --mark: #ffe3a3;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73; --series-3: #b6569a;
  --series-4: #8a6d00; --series-5: #2f8fc4; --series-6: #6b6b6b; --series-7: #3b2f8f;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --serif: Charter, "Bitstream Charter", "Source Serif 4", Cambria, Georgia, serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16171a; --ink: #e9e6e0; --muted: #a5a199; --rule: #393a3e; --wash: #202226;
    --link: #7cc0f0; --warn: #f5cf87; --warn-wash: #33290f;
    --leak: #ff9d9d; --leak-wash: #3d1216;
    --mark: #5a4613;
    --series-0: #58b2ec; --series-1: #ff8a47; --series-2: #2fc99a; --series-3: #e59acb;
    --series-4: #e0bd3c; --series-5: #9ad4f5; --series-6: #b3b3b3; --series-7: #a79cf0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem;
  background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.55 var(--serif); text-rendering: optimizeLegibility; hyphens: manual;
}
p, ul, dl { max-width: 44rem; }
h1, h2, h3 { line-height: 1.2; text-wrap: balance; font-weight: 600; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.35rem); margin: 0.2rem 0 1rem; max-width: 48rem; }
h2 {
  font-size: 1.5rem; margin: 3.25rem 0 0.75rem; padding-top: 0.8rem;
  border-top: 2px solid var(--ink);
}
h3 { font-size: 1.15rem; margin: 2.25rem 0 0.5rem; }
a { color: var(--link); }
.kicker, nav, figcaption, table, dl, .note, summary { font-family: var(--sans); }
.kicker {
  margin: 0; font-size: 0.8rem; letter-spacing: 0.08em; text-transform: uppercase;
  color: var(--muted);
}
.banner {
  max-width: none; margin: 0 0 1.75rem; padding: 0.7rem 1rem; border-left: 4px solid var(--warn);
  background: var(--warn-wash); color: var(--warn); font: 0.95rem/1.45 var(--sans);
}
.leak {
  border: 3px solid var(--leak); border-left-width: 12px; background: var(--leak-wash);
  color: var(--leak); font-size: 1.05rem;
}
.leak strong { font-size: 1.15rem; }
.leak ul { margin: 0.5rem 0 0; padding-left: 1.2rem; max-width: none; }
.lede { font-size: 1.15rem; }
.verdict { padding-left: 1.1rem; }
.verdict li { margin: 0.35rem 0; }
nav { margin: 1.5rem 0 0; font-size: 0.9rem; }
nav a { margin-right: 1.1rem; white-space: nowrap; }
dl.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.1rem; font-size: 0.88rem;
  margin: 1rem 0;
}
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code { font: 0.86em/1.4 var(--mono); overflow-wrap: anywhere; }
pre {
  background: var(--wash); padding: 0.7rem 0.9rem; font: 0.82rem/1.5 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.5rem 0 1rem;
}
.note { font-size: 0.9rem; color: var(--muted); }
figure { margin: 0; }
figcaption {
  font-size: 0.85rem; line-height: 1.45; color: var(--muted); max-width: 44rem;
  margin: 0.7rem 0 1.75rem;
}
figcaption b { color: var(--ink); font-weight: 600; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: 1.25rem 1.75rem; align-items: start;
}
.panels {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr));
  gap: 1rem 0.5rem; align-items: start; margin-top: 1rem;
}
.told {
  margin: 0.1rem 0 0; padding-left: 0.2rem; white-space: pre-line; max-width: 11rem;
  color: var(--muted); font: 0.72rem/1.45 var(--sans); font-variant-numeric: tabular-nums;
}
svg { display: block; max-width: 100%; height: auto; overflow: visible; }
/* Text keeps off the lines of a grid below it. */
svg text {
  font-family: var(--sans); paint-order: stroke; stroke: var(--paper); stroke-width: 5px;
}
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; margin: 1rem 0 0.4rem; }
table {
  border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums lining-nums;
  border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink);
}
th, td {
  padding: 0.42rem 0.9rem 0.42rem 0; text-align: right; vertical-align: baseline;
  white-space: nowrap;
}
th:last-child, td:last-child { padding-right: 0.2rem; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 400; }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
thead th {
  border-bottom: 1px solid var(--ink); font-weight: 600; vertical-align: bottom;
  white-space: normal; max-width: 11rem;
}
thead button {
  font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit;
}
thead button::after {
  content: "\\2195"; color: var(--muted); margin-left: 0.25em; font-weight: 400;
}
th[aria-sort="ascending"] button::after { content: "\\2191"; color: inherit; }
th[aria-sort="descending"] button::after { content: "\\2193"; color: inherit; }
button:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px;
}
tbody th { white-space: normal; max-width: 12rem; }
td.protocol { text-align: left; max-width: 9rem; white-space: normal; }
.main th, .main td { padding-right: 0.65rem; }
th.name, td.name { text-align: left; white-space: normal; }
.better { color: var(--series-0); font-weight: 600; }
.worse { color: var(--series-1); font-weight: 600; }
sup { line-height: 0; }
.ci { display: block; color: var(--muted); font-size: 0.88em; }
.swatch {
  display: inline-block; width: 0.65em; height: 0.65em; margin-right: 0.45em;
  border-radius: 50%;
}
thead .swatch { display: block; margin: 0 0 0.3em auto; }
.why {
  display: block; max-width: 9rem; margin-left: auto; white-space: normal; color: var(--muted);
  font-size: 0.88em; line-height: 1.3;
}
.legend {
  display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; max-width: none; margin: 0.75rem 0;
  font: 0.88rem/1.5 var(--sans);
}
.mark { display: inline-block; width: 1em; text-align: center; }
thead .mark { display: block; margin-left: auto; text-align: right; }
tr.total > * { border-top: 1px solid var(--ink); }
.heatmaps { display: flex; flex-wrap: wrap; gap: 1rem 2.25rem; align-items: start; }
.heatmaps > div { max-width: 100%; }
.heatmaps .scroll { margin-top: 0.3rem; }
h4, h5 { font: 600 0.95rem/1.3 var(--sans); margin: 1.25rem 0 0.25rem; }
.heat th, .heat td { padding: 0.45rem 0.7rem; }
.heat td, .heat thead th + th { text-align: center; }
.heat td { min-width: 6.5rem; }
.heat .ci { color: inherit; }
.heat .own { outline: 2px solid var(--ink); outline-offset: -3px; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; font-size: 0.9rem; color: var(--link); }
img { display: block; width: 100%; height: auto; background: #000; }
.examples {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 1.4rem 1.75rem; margin-top: 1rem;
}
.reports { display: grid; gap: 1.4rem; margin-top: 1rem; }
.report { display: grid; grid-template-columns: minmax(7rem, 14rem) 1fr; gap: 1rem; }
.report > div { min-width: 0; overflow-wrap: anywhere; }
.report p { margin: 0 0 0.6rem; font-size: 0.9rem; }
.report .stated { font-size: 0.85rem; color: var(--muted); }
.report .stated span { color: var(--ink); border-left: 0.25rem solid; padding-left: 0.35rem; }
.report .stated span + span { margin-left: 0.3rem; }
.report .stated .found { border-color: var(--series-2); }
.report .stated .missed { border-color: var(--series-1); }
.report .stated .invented { border-color: var(--series-3); }
.report .prompt { color: var(--muted); white-space: pre-line; }
mark { background: var(--mark); color: inherit; }
.triple { display: grid; grid-template-columns: repeat(3, 1fr); gap: 3px; }
.example figcaption { margin: 0.35rem 0 0; color: var(--ink); font-size: 0.82rem; }
.heads {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 10rem)); gap: 0.6rem;
  margin-top: 1rem;
}
.heads figcaption, .neighbours figcaption {
  margin: 0.25rem 0 0; font-size: 0.78rem; line-height: 1.35;
}
.neighbours {
  display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 0.6rem;
  margin: 1.2rem 0;
}
.neighbours img { aspect-ratio: 1; object-fit: contain; }
.neighbours .query { outline: 2px solid var(--ink); outline-offset: 2px; }
.square > img { aspect-ratio: 1; }
@media (max-width: 40rem) {
  body { padding: 1.25rem 1rem 3rem; font-size: 1rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: 0.5rem; }
  .neighbours { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
  tbody th { white-space: normal; min-width: 7rem; }
  .heads { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
@media print {
  :root { --paper: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, thead button::after { display: none; }
  h2 { break-after: avoid; } h3 { break-after: avoid; }
  figure, tr, .panels > *, .triple, .neighbours { break-inside: avoid; }
  .scroll { overflow: visible; }
  .banner, img, .swatch, .heat td { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const empty = (value) => value === "";
      const down = head.getAttribute("aria-sort") !== "descending" && column > 0 ||
        head.getAttribute("aria-sort") === "ascending";
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (empty(x) || empty(y)) return empty(x) - empty(y);
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      table.tBodies[0].append(...rows);
    });
  });
}
"""
