"use strict";
const box = document.getElementById("search"), group = document.getElementById("group");
const rows = Array.from(document.querySelectorAll("#samples tbody tr"));
const count = document.getElementById("found");
function filter() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    const shown = (!group.value || row.dataset.group === group.value) && words.every((word) => text.includes(word));
    row.hidden = !shown;
    found += shown;
  }
  count.textContent = found + " of " + rows.length + " samples";
}
if (box) {
  box.addEventListener("input", filter);
  group.addEventListener("change", filter);
  filter();
}
