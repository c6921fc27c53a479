
"use strict";
(function () {
  // Sorting: ascending, descending, then the order of the file again. Empty cells stay last.
  function key(row, column) {
    var cell = row.cells[column];
    if (cell.dataset.sort !== undefined) return parseFloat(cell.dataset.sort);
    return cell.textContent.trim();
  }
  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true, sensitivity: "base" });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var body = table.tBodies[0];
    var original = Array.prototype.slice.call(body.rows);
    var heads = Array.prototype.slice.call(table.tHead.rows[0].cells);
    heads.forEach(function (head, column) {
      var button = head.querySelector("button");
      button.disabled = false;
      button.addEventListener("click", function () {
        var was = head.getAttribute("aria-sort");
        var now = was === "none" ? "ascending" : was === "ascending" ? "descending" : "none";
        heads.forEach(function (other) { other.setAttribute("aria-sort", "none"); });
        head.setAttribute("aria-sort", now);
        var rows = original.slice();
        if (now !== "none") {
          rows.sort(function (x, y) {
            var a = key(x, column), b = key(y, column);
            if (a === "" || b === "") return (a === "") - (b === "");
            return now === "ascending" ? compare(a, b) : compare(b, a);
          });
        }
        rows.forEach(function (row) { body.appendChild(row); });
      });
    });
  });
  // Pictures wider than the page open to their own size and close again.
  document.querySelectorAll(".picture .scroll").forEach(function (frame) {
    frame.addEventListener("click", function () { frame.classList.toggle("full"); });
  });
  var copy = document.getElementById("copy"), command = document.getElementById("command");
  if (copy && command) {
    copy.hidden = false;
    copy.addEventListener("click", function () {
      var select = function () {
        var range = document.createRange();
        range.selectNodeContents(command);
        var selection = window.getSelection();
        selection.removeAllRanges();
        selection.addRange(range);
        return document.execCommand("copy");
      };
      var done = function (ok) {
        copy.textContent = ok === false ? "Press Ctrl+C" : "Copied";
        setTimeout(function () { copy.textContent = "Copy"; }, 1500);
      };
      if (navigator.clipboard && navigator.clipboard.writeText) {
        navigator.clipboard.writeText(command.textContent).then(done, function () { done(select()); });
      } else {
        done(select());
      }
    });
  }
})();
