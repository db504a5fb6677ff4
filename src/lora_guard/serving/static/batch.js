// The batch: texts from a file or the page, judged some at a time, shown in a table and given back as files.

import { categoriesOf, el, guard, make, post, readable } from "./common.js";

let judged = [];
let running = null;

function parse(text) {
  if (text.trimStart().startsWith("[")) throw new Error("a JSON array is not read; give one object a line (JSONL)");
  const lines = text.split(/\r?\n/).filter((line) => line.trim());
  const fields = ["text", "prompt", "input", "content"];
  if (lines.length && lines.every((line) => line.trim().startsWith("{"))) {
    return lines.map((line, index) => {
      let row;
      try {
        row = JSON.parse(line);
      } catch {
        throw new Error(`line ${index + 1} is not JSON`);
      }
      const field = fields.find((name) => typeof row[name] === "string");
      if (!field) throw new Error(`line ${index + 1} has no field ${fields.join(", ")}`);
      return row[field];
    });
  }
  const table = csv(text);
  const names = (table[0] ?? []).map((name) => name.trim().toLowerCase());
  const column = names.findIndex((name) => fields.includes(name));
  return column < 0 ? lines : table.slice(1).map((row) => row[column] ?? "").filter((cell) => cell.trim());
}

// RFC 4180: quoted cells may hold commas, line breaks and doubled quotes.
function csv(text) {
  const rows = [[]];
  const pattern = /("(?:[^"]|"")*"|[^,\r\n]*)(,|\r?\n|$)/y;
  for (let match; pattern.lastIndex < text.length && (match = pattern.exec(text)); ) {
    rows.at(-1).push(match[1].startsWith('"') ? match[1].slice(1, -1).replaceAll('""', '"') : match[1]);
    if (match[2] !== ",") rows.push([]);
  }
  return rows.filter((row) => row.some((cell) => cell.trim()));
}

async function judge() {
  const state = el("batch-state");
  state.className = "muted";
  state.textContent = "";
  judged = [];
  el("verdicts").replaceChildren();
  el("by-score").parentElement.setAttribute("aria-sort", "none");
  try {
    const texts = parse(el("rows").value);
    if (!texts.length) throw new Error("there is no text to judge");
    busy(new AbortController());
    for (let start = 0; start < texts.length; start += 16) {
      const input = texts.slice(start, start + 16);
      const results = await moderated(input, running.signal);
      const rows = results.map((result, index) => ({ number: start + index + 1, text: input[index], ...result }));
      judged.push(...rows);
      el("verdicts").append(...rows.map(line));
      el("progress").value = judged.length / texts.length;
    }
    state.textContent = count();
  } catch (error) {
    state.className = error.name === "AbortError" ? "muted" : "error";
    const what = error.name === "AbortError" ? "Stopped." : error.message;
    state.textContent = judged.length ? `${what} Before that: ${count()}` : what;
  } finally {
    busy(null);
    el("save-jsonl").disabled = el("save-csv").disabled = !judged.length;
  }
}

const count = () => `${judged.length} judged, ${judged.filter((row) => row.flagged).length} flagged.`;

// The results of some texts; a busy server is asked again when it says so, one that takes fewer at once gets halves.
async function moderated(input, signal) {
  for (;;) {
    try {
      return (await (await post("v1/moderations", { model: guard(), input }, signal)).json()).results;
    } catch (error) {
      if ([400, 413].includes(error.status) && input.length > 1) {
        const half = Math.ceil(input.length / 2);
        return [...(await moderated(input.slice(0, half), signal)), ...(await moderated(input.slice(half), signal))];
      }
      if (!error.retryAfter) throw error;
      await new Promise((done) => setTimeout(done, 1000 * error.retryAfter));
      signal.throwIfAborted();
    }
  }
}

function busy(controller) {
  running = controller;
  el("judge").disabled = Boolean(controller);
  el("stop-batch").disabled = !controller;
  el("progress").hidden = !controller;
  el("progress").value = 0;
}

const highest = (row) => categoriesOf(row)[0] ?? ["none", 0];

function line(row) {
  const [name, score] = highest(row);
  const node = make("tr", row.flagged ? "flagged" : "");
  const cells = [row.number, row.text, row.flagged ? "flagged" : "ok", row.score.toFixed(3), `${readable(name)} ${score.toFixed(2)}`];
  node.append(...cells.map((cell) => make("td", "", cell)));
  return node;
}

function sortByScore() {
  const header = el("by-score").parentElement;
  const down = header.getAttribute("aria-sort") !== "descending";
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  judged.sort((a, b) => (down ? b.score - a.score : a.score - b.score));
  el("verdicts").replaceChildren(...judged.map(line));
}

function save(name, type, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// A cell that begins like a formula would be run by a spreadsheet.
const cell = (value) => `"${String(value).replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;

function saveCsv() {
  const rows = judged.map((row) => [row.text, row.flagged, row.score, ...highest(row).slice(0, 2)]);
  const table = [["text", "flagged", "score", "highest_category", "highest_score"], ...rows];
  save("verdicts.csv", "text/csv", table.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n");
}

const saveJsonl = () => save("verdicts.jsonl", "application/jsonl", judged.map((row) => JSON.stringify(row) + "\n").join(""));

async function open(file) {
  if (file) el("rows").value = await file.text();
}

export function start() {
  el("judge").addEventListener("click", judge);
  el("stop-batch").addEventListener("click", () => running?.abort());
  el("by-score").addEventListener("click", sortByScore);
  el("save-jsonl").addEventListener("click", saveJsonl);
  el("save-csv").addEventListener("click", saveCsv);
  el("file").addEventListener("change", (event) => {
    open(event.target.files[0]);
    event.target.value = ""; // the same file can be opened again
  });
  el("batch").addEventListener("dragover", (event) => {
    event.preventDefault();
    el("batch").classList.add("dropping");
  });
  el("batch").addEventListener("dragleave", () => el("batch").classList.remove("dropping"));
  el("batch").addEventListener("drop", (event) => {
    event.preventDefault();
    el("batch").classList.remove("dropping");
    open(event.dataTransfer.files[0]);
  });
}
