// The chat: tokens coloured by the check that covers them, the shown answer's scores, and the policy.

import { categoriesOf, el, guard, make, post } from "./common.js";
import { drawBars, drawLine } from "./drawing.js";

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

// An answer: its pieces of text, each with the score of the check that covers it, and the checks.
let answers = [];
let shown = null;
let history = [];
let running = null;

class Answer {
  constructor(node, mode) {
    this.node = node;
    this.mode = mode;
    this.pieces = [];
    this.checks = [];
    this.prompt = null;
    this.blocked = false;
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
  if (!shown) return;
  shown.paint();
  drawLine(shown.checks, shown.cut, threshold("response"));
  if (shown.last) drawBars(shown.last);
  drawSummary();
}

// A moved threshold changes what each answer of the conversation would have lost.
function drawAll() {
  for (const answer of answers) answer.paint();
  draw();
}

function show(answer) {
  shown = answer;
  for (const { node } of answers) node.classList.toggle("shown", node === answer.node && answers.length > 1);
  draw();
}

function drawSummary() {
  const { prompt, cut, checks, mode } = shown;
  const parts = [];
  if (prompt) {
    const over = prompt.score >= threshold("prompt");
    parts.push(`Prompt ${prompt.score.toFixed(2)}${shown.blocked ? ": was blocked" : over ? ": would be blocked" : ""}.`);
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
    model: guard(),
    stream: true,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    max_tokens: Number(el("tokens").value),
    temperature: Number(el("temperature").value),
    moderation: {
      model: guard(),
      policy: { input: { mode: el("input-mode").value }, output: { mode: el("output-mode").value } },
    },
    lora_guard: options,
  };
}

const atEnd = () => {
  const box = el("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 40;
};

const toEnd = () => {
  const box = el("messages");
  box.scrollTop = box.scrollHeight;
};

function say(role, text) {
  const node = make("div", `message ${role}`, text);
  el("messages").append(node);
  toEnd();
  node.scrollIntoView({ block: "nearest" });
  return node;
}

function answering() {
  const answer = new Answer(say("assistant"), el("output-mode").value);
  answer.node.tabIndex = 0;
  answer.node.title = "Show this answer's scores";
  answer.node.addEventListener("focus", () => show(answer));
  answers.push(answer);
  own.prompt = own.response = null;
  show(answer);
  return answer;
}

async function ask(event) {
  event.preventDefault();
  const text = el("prompt").value;
  if (!text.trim() || running) return;
  el("prompt").value = "";
  say("user", text);
  const asked = [...history, { role: "user", content: text }];
  const answer = answering();
  const controller = new AbortController();
  busy(controller);
  let note = ["", false];
  try {
    const response = await post("v1/chat/completions", request(asked), controller.signal);
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const follow = atEnd();
      note = take(chunk, answer) ?? note;
      draw();
      if (follow) toEnd();
    }
  } catch (error) {
    note = stopped(error, answer);
    // What was refused for another reason than its words can be sent again.
    if (!answer.text && !answer.prompt && !el("prompt").value) el("prompt").value = text;
  }
  if (running !== controller) return; // a new conversation has begun
  busy(null);
  if (answer.text) history = [...asked, { role: "assistant", content: answer.text }];
  draw();
  if (note[0]) answer.node.append(make("span", note[1] ? "note flagged" : "note", note[0]));
  toEnd();
  el("prompt").focus({ preventScroll: true });
}

// One chunk of the stream; returns a note for the end of the answer, if the chunk ends it.
function take(chunk, answer) {
  if (chunk.lora_guard) answer.check(chunk.lora_guard);
  const choice = chunk.choices[0];
  if (choice?.delta.content) answer.add(choice.delta.content);
  if (choice?.finish_reason === "content_filter") return ["Withheld: the answer, or the rest of it, was flagged.", true];
  if (choice?.finish_reason === "length") return ["Cut at the longest answer.", false];
  if (chunk.moderation?.output?.type === "error") return [chunk.moderation.output.message, true];
  return undefined;
}

function stopped(error, answer) {
  if (error.name === "AbortError") return ["Stopped.", false];
  const result = error.detail?.moderation?.input?.results?.[0];
  if (!result) return [error.message, true];
  answer.blocked = true;
  const categories = Object.fromEntries(categoriesOf(result).map(([name, score, flagged]) => [name, { score, flagged }]));
  answer.check({ target: "prompt", tokens: 0, score: result.score, threshold: result.threshold, categories });
  return ["Not answered: the prompt was flagged by the guard.", true];
}

function busy(controller) {
  running = controller;
  el("send").disabled = Boolean(controller);
  el("stop").disabled = !controller;
  el("messages").setAttribute("aria-busy", String(Boolean(controller)));
}

function clear() {
  running?.abort();
  busy(null);
  history = [];
  answers = [];
  shown = null;
  el("messages").replaceChildren();
  el("line").replaceChildren();
  el("bars").replaceChildren();
  el("no-bars").hidden = false;
  el("of").textContent = "";
  el("summary").textContent = "Ask something: each check of the answer becomes a point.";
}

export function start() {
  for (const target of ["prompt", "response"]) {
    el(`${target}-threshold`).addEventListener("input", (event) => {
      chosen[target] = Number(event.target.value);
      drawAll();
    });
  }
  el("own").addEventListener("click", () => {
    chosen.prompt = chosen.response = null;
    drawAll();
  });
  el("ask").addEventListener("submit", ask);
  el("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
  });
  el("stop").addEventListener("click", () => running?.abort());
  el("clear").addEventListener("click", clear);
  showThresholds();
}
