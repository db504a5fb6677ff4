// The playground: speaks the server's public API and nothing else. Text only ever enters the page as text nodes.
"use strict";

const el = (id) => document.getElementById(id);
const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

const readable = (category) => category.replaceAll("_", " ").replaceAll(",", ", ");

const headers = () => {
  const key = el("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  return Object.assign(new Error(body.error?.message ?? `HTTP ${response.status}`), { detail: body.error });
}

async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) throw await failure(response);
  return response;
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw await failure(response);
    el("model").textContent = (await response.json()).data[0].id;
  } catch (error) {
    el("model").textContent = error.message;
  }
}

// Thresholds: null stands for the guard's own, which come with each check.
const chosen = { prompt: null, response: null };
const own = { prompt: null, response: null };
const threshold = (target) => chosen[target] ?? own[target] ?? 0.5;

function showThresholds() {
  for (const target of ["prompt", "response"]) {
    const value = threshold(target);
    el(`${target}-threshold`).value = value;
    const known = chosen[target] === null && own[target] === null;
    el(`${target}-threshold-value`).textContent =
      known ? "guard's own" : value.toFixed(2) + (chosen[target] === null ? " (guard's own)" : "");
  }
}

// One answer: its pieces of text, each with the score of the check that covers it, and the checks.
let answer = null;
let history = [];
let running = null;

class Answer {
  constructor(node, mode) {
    this.node = node;
    this.mode = mode;
    this.pieces = [];
    this.checks = [];
    this.prompt = null;
    this.last = null;
  }

  add(text) {
    const piece = { node: make("span", "token", text), check: this.mode === "block" ? this.checks.at(-1) : undefined };
    this.pieces.push(piece);
    this.node.append(piece.node);
  }

  check(check) {
    own[check.target] ??= chosen[check.target] === null ? check.threshold : null;
    if (check.target === "prompt") {
      this.prompt = check;
    } else {
      for (const piece of this.pieces) piece.check ??= check;
      this.checks.push(check);
    }
    this.last = check;
  }

  get text() {
    return this.pieces.map((piece) => piece.node.textContent).join("");
  }

  // The first check at or over the threshold; in block mode the text it covers, and all behind it, does not leave.
  get cut() {
    return this.checks.find((check) => check.score >= threshold("response"));
  }

  paint() {
    const cut = this.cut;
    for (const { node, check } of this.pieces) {
      if (!check) continue;
      node.style.setProperty("--heat", check.score);
      node.classList.toggle("over", check.score >= threshold("response"));
      node.classList.toggle("withheld", Boolean(cut) && check.tokens >= cut.tokens);
      node.title = `score ${check.score.toFixed(3)} at ${check.tokens} tokens`;
    }
  }
}

function draw() {
  showThresholds();
  if (!answer) return;
  answer.paint();
  drawLine(answer.checks, answer.cut);
  if (answer.last) drawBars(answer.last);
  drawSummary();
}

function svg(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function drawLine(checks, cut) {
  const [left, right, top, bottom] = [26, 312, 8, 110];
  const most = Math.max(1, ...checks.map((check) => check.tokens));
  const x = (tokens) => left + ((right - left) * tokens) / most;
  const y = (score) => bottom - (bottom - top) * score;
  const limit = threshold("response");
  const nodes = [
    svg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${right}`, fill: "none" }),
    svg("text", { x: 4, y: y(0) + 3 }, "0"),
    svg("text", { x: 4, y: y(1) + 6 }, "1"),
    svg("text", { x: right, y: 124, "text-anchor": "end" }, `${most} tokens`),
    svg("line", { class: "threshold", x1: left, x2: right, y1: y(limit), y2: y(limit) }),
    svg("path", { class: "curve", d: checks.map((c, i) => `${i ? "L" : "M"}${x(c.tokens)} ${y(c.score)}`).join("") }),
  ];
  for (const check of checks) {
    const over = check.score >= limit;
    const point = svg("circle", { class: over ? "over" : "", cx: x(check.tokens), cy: y(check.score), r: over ? 4 : 2.5 });
    point.append(svg("title", {}, `${check.score.toFixed(3)} at ${check.tokens} tokens`));
    nodes.push(point);
  }
  if (cut) nodes.push(svg("line", { class: "cut", x1: x(cut.tokens), x2: x(cut.tokens), y1: top, y2: bottom }));
  el("line").replaceChildren(...nodes);
  const highest = Math.max(0, ...checks.map((check) => check.score));
  el("line").setAttribute("aria-label", `${checks.length} checks, highest score ${highest.toFixed(2)}`);
}

function drawBars(check) {
  const rows = Object.entries(check.categories).sort((a, b) => b[1].score - a[1].score);
  el("no-bars").hidden = rows.length > 0;
  el("of").textContent = `of the ${check.target === "prompt" ? "prompt" : `answer at ${check.tokens} tokens`}`;
  el("bars").replaceChildren(
    ...rows.map(([name, decision]) => {
      const row = make("li", decision.flagged ? "flagged" : "");
      const bar = make("div", "bar");
      bar.append(make("div", "fill"), make("div", "limit"));
      bar.style.setProperty("--score", decision.score);
      bar.style.setProperty("--limit", decision.threshold);
      row.title = `${name}: ${decision.score.toFixed(3)}, flagged from ${decision.threshold.toFixed(2)} on`;
      row.append(make("span", "name", readable(name)), bar, make("span", "value", decision.score.toFixed(2)));
      return row;
    }),
  );
}

function drawSummary() {
  const { prompt, cut, checks, mode } = answer;
  const parts = [];
  if (prompt) {
    const over = prompt.score >= threshold("prompt");
    parts.push(`Prompt ${prompt.score.toFixed(2)}${over ? ": would be blocked" : ""}.`);
  }
  if (checks.length) {
    const would = mode === "block" ? "was" : "would be";
    parts.push(cut ? `The answer ${would} withheld at ${cut.tokens} tokens.` : `No part of the answer ${would} withheld.`);
  }
  el("summary").textContent = parts.join(" ") || "No check yet.";
}

// Server-sent events of one response, as parsed JSON.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function request(messages) {
  const system = el("system").value.trim();
  const options = { checks: true, check_every: Number(el("every").value) };
  if (chosen.prompt !== null) options.prompt_threshold = chosen.prompt;
  if (chosen.response !== null) options.response_threshold = chosen.response;
  return {
    model: "playground",
    stream: true,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    max_tokens: Number(el("tokens").value),
    temperature: Number(el("temperature").value),
    moderation: {
      model: "playground",
      policy: { input: { mode: el("input-mode").value }, output: { mode: el("output-mode").value } },
    },
    lora_guard: options,
  };
}

function say(role, text) {
  const node = make("div", `message ${role}`, text);
  el("messages").append(node);
  node.scrollIntoView({ block: "nearest" });
  return node;
}

async function ask(event) {
  event.preventDefault();
  const text = el("prompt").value;
  if (!text.trim() || running) return;
  el("prompt").value = "";
  say("user", text);
  const asked = [...history, { role: "user", content: text }];
  const node = say("assistant");
  answer = new Answer(node, el("output-mode").value);
  own.prompt = own.response = null;
  busy(new AbortController());
  let note = ["", false];
  try {
    const response = await post("v1/chat/completions", request(asked), running.signal);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      note = take(chunk) ?? note;
      draw();
    }
    if (answer.text) history = [...asked, { role: "assistant", content: answer.text }];
  } catch (error) {
    note = stopped(error);
  } finally {
    busy(null);
    draw();
    if (note[0]) node.append(make("span", note[1] ? "note flagged" : "note", note[0]));
    el("prompt").focus();
  }
}

// One chunk of the stream; returns a note for the end of the answer, if the chunk ends it.
function take(chunk) {
  if (chunk.lora_guard) answer.check(chunk.lora_guard);
  const choice = chunk.choices[0];
  if (choice?.delta.content) answer.add(choice.delta.content);
  if (choice?.finish_reason === "content_filter") return ["Withheld: the answer, or the rest of it, was flagged.", true];
  if (choice?.finish_reason === "length") return ["Cut at the longest answer.", false];
  if (chunk.moderation?.output?.type === "error") return [chunk.moderation.output.message, true];
  return undefined;
}

function stopped(error) {
  if (error.name === "AbortError") return ["Stopped.", false];
  const result = error.detail?.moderation?.input?.results?.[0];
  if (result) {
    const known = Object.keys(result.category_scores).filter((name) => name in result.categories);
    const categories = Object.fromEntries(
      known.map((name) => [name, { score: result.category_scores[name], flagged: result.categories[name], threshold: 0.5 }]),
    );
    answer.check({ target: "prompt", tokens: 0, score: result.score, threshold: result.threshold, categories });
  }
  return [error.message, true];
}

function busy(controller) {
  running = controller;
  el("send").disabled = Boolean(controller);
  el("stop").disabled = !controller;
}

// Batch

let judged = [];

function parse(text) {
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
  judged = [];
  try {
    const texts = parse(el("rows").value);
    if (!texts.length) throw new Error("there is no text to judge");
    el("judge").disabled = true;
    el("progress").hidden = false;
    for (let start = 0; start < texts.length; start += 16) {
      const input = texts.slice(start, start + 16);
      const { results } = await (await post("v1/moderations", { input })).json();
      results.forEach((result, index) => judged.push({ number: start + index + 1, text: input[index], ...result }));
      el("progress").value = judged.length / texts.length;
      showVerdicts();
    }
    state.textContent = `${judged.length} judged, ${judged.filter((row) => row.flagged).length} flagged.`;
  } catch (error) {
    state.className = "error";
    state.textContent = error.message;
  } finally {
    el("judge").disabled = false;
    el("progress").hidden = true;
    el("save-jsonl").disabled = el("save-csv").disabled = !judged.length;
  }
}

const highest = (row) => Object.entries(row.category_scores).sort((a, b) => b[1] - a[1])[0];

function showVerdicts() {
  el("verdicts").replaceChildren(
    ...judged.map((row) => {
      const [name, score] = highest(row);
      const line = make("tr", row.flagged ? "flagged" : "");
      const cells = [row.number, row.text, row.flagged ? "flagged" : "ok", row.score.toFixed(3), `${readable(name)} ${score.toFixed(2)}`];
      line.append(...cells.map((cell) => make("td", "", cell)));
      return line;
    }),
  );
}

function sortByScore() {
  const header = el("by-score").parentElement;
  const down = header.getAttribute("aria-sort") !== "descending";
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  judged.sort((a, b) => (down ? b.score - a.score : a.score - b.score));
  showVerdicts();
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
  const rows = judged.map((row) => [row.text, row.flagged, row.score, ...highest(row)]);
  const table = [["text", "flagged", "score", "highest_category", "highest_score"], ...rows];
  save("verdicts.csv", "text/csv", table.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n");
}

const saveJsonl = () => save("verdicts.jsonl", "application/jsonl", judged.map((row) => JSON.stringify(row) + "\n").join(""));

async function open(file) {
  if (file) el("rows").value = await file.text();
}

// Wiring

function select(name) {
  for (const view of ["chat", "batch"]) {
    const active = view === name;
    el(view).hidden = !active;
    el(`tab-${view}`).setAttribute("aria-selected", String(active));
    el(`tab-${view}`).tabIndex = active ? 0 : -1;
  }
}

function switchByKey(event) {
  if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  const other = el("chat").hidden ? "chat" : "batch";
  select(other);
  el(`tab-${other}`).focus();
}

for (const view of ["chat", "batch"]) {
  el(`tab-${view}`).addEventListener("click", () => select(view));
  el(`tab-${view}`).addEventListener("keydown", switchByKey);
}
for (const target of ["prompt", "response"]) {
  el(`${target}-threshold`).addEventListener("input", (event) => {
    chosen[target] = Number(event.target.value);
    draw();
  });
}
el("own").addEventListener("click", () => {
  chosen.prompt = chosen.response = null;
  draw();
});
el("ask").addEventListener("submit", ask);
el("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
el("stop").addEventListener("click", () => running?.abort());
el("clear").addEventListener("click", () => {
  running?.abort();
  history = [];
  answer = null;
  el("messages").replaceChildren();
  el("line").replaceChildren();
  el("bars").replaceChildren();
  el("no-bars").hidden = false;
  el("of").textContent = "";
  el("summary").textContent = "Ask something: each check of the answer becomes a point.";
});
el("key").addEventListener("change", connect);
el("access").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
el("judge").addEventListener("click", judge);
el("by-score").addEventListener("click", sortByScore);
el("save-jsonl").addEventListener("click", saveJsonl);
el("save-csv").addEventListener("click", saveCsv);
el("file").addEventListener("change", (event) => open(event.target.files[0]));
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
showThresholds();
connect();
