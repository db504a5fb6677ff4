// The playground: speaks the server's public API and nothing else.

import * as batch from "./batch.js";
import * as chat from "./chat.js";
import { connect, el } from "./common.js";

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
el("key").addEventListener("change", connect);
el("access").addEventListener("submit", (event) => {
  event.preventDefault();
  connect();
});
chat.start();
batch.start();
connect();
