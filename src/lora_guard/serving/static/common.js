// What both views share: the page's elements, the server's public API, and the guard's categories.

export const el = (id) => document.getElementById(id);

// Text only ever enters the page as text nodes.
export const make = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

export const readable = (category) => category.replaceAll("_", " ").replaceAll(",", ", ");

const headers = () => {
  const key = el("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
};

// A response of the server; every failure is an Error with a message to show and, where there is one, the server's detail.
async function call(path, options) {
  let response;
  try {
    response = await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401) needKey();
  const body = await response.json().catch(() => ({}));
  throw Object.assign(new Error(body.error?.message ?? `HTTP ${response.status}`), {
    status: response.status,
    detail: body.error,
    retryAfter: response.status === 429 ? Number(response.headers.get("retry-after") ?? 1) : null,
  });
}

export const get = (path) => call(path, {});
export const post = (path, body, signal) => call(path, { method: "POST", body: JSON.stringify(body), signal });

function needKey() {
  el("key").placeholder = "needed";
  el("key").classList.add("needed");
}

export async function connect() {
  try {
    const names = (await (await get("v1/models")).json()).data.map((model) => model.id);
    offer(names);
    el("model").textContent = names.length > 1 ? "" : names[0];
    el("model").className = "muted";
    el("key").classList.remove("needed");
  } catch (error) {
    const key = error.detail?.code === "invalid_api_key" && (el("key").value ? "This API key is unknown." : "This server needs an API key.");
    el("model").textContent = key || error.message;
    el("model").className = "error";
  }
}

// The choice among several guards; what was chosen stays chosen while the server has it.
function offer(names) {
  const before = el("guard").value;
  el("guard").replaceChildren(...names.map((name) => new Option(name)));
  el("guard").value = names.includes(before) ? before : names[0];
  el("choice").hidden = names.length < 2;
}

export const guard = () => el("guard").value || "playground";

// Moderation results name OpenAI's categories beside the guard's own, which say more.
const OPENAI = new Set([
  "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
  "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
]);

// [name, score, flagged] of a result's categories, the highest score first.
export function categoriesOf(result) {
  const names = Object.keys(result.category_scores);
  const own = names.filter((name) => !OPENAI.has(name));
  const rows = (own.length ? own : names).map((name) => [name, result.category_scores[name], result.categories[name]]);
  return rows.sort((a, b) => b[1] - a[1]);
}
