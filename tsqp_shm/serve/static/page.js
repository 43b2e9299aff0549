"use strict";

// A chat with the server that this page came from. Messages and key live in this page's memory and nowhere else.

const find = (id) => document.getElementById(id);
const log = find("log"), prompt = find("prompt"), trouble = find("trouble");
const messages = [];
let key = "", going = null;

const headers = () => ({ "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) });

// What each refusal asks of whoever reads it.
const ADVICE = {
  context_length_exceeded: "The conversation has outgrown the model: begin a new one.",
  queue_full: "Many are waiting: try again in a moment.",
  loading: "The model is being loaded: try again in a moment.",
  draining: "The server is about to end: ask whoever runs it.",
  integrity_error: "The other process gave a false result, so nothing more is answered. Tell whoever runs the server.",
  pads_exhausted: "There are no pads for this at the moment: try again in a moment.",
};

function say(words) {
  trouble.textContent = words;
  trouble.hidden = !words;
}

function explained(status, error) {
  if (status === 401) return "";
  const advice = ADVICE[error.code] || (status >= 500 ? "Look at what the server prints, or restart it." : "");
  return [error.message, advice].filter(Boolean).join(". ");
}

async function refusalOf(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) {
    key = "";
    find("key-form").hidden = false;
    find("key").focus();
  }
  return explained(response.status, body?.error || { message: `The server answered ${response.status}` });
}

// Follows the end only for who is at the end: reading on is not disturbed.
function added(change) {
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (follows) log.scrollTop = log.scrollHeight;
}

function show(role, text) {
  const article = document.createElement("article");
  article.className = role;
  const body = document.createElement("span");
  body.textContent = text;
  article.append(body);
  find("empty").hidden = true;
  added(() => log.append(article));
  return { article, body };
}

function note(article, words) {
  const foot = document.createElement("footer");
  foot.textContent = words;
  added(() => article.append(foot));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(content) {
  say("");
  messages.push({ role: "user", content });
  const asked = show("user", content);
  const controller = going = new AbortController();
  setGoing(true);
  let answer = null, text = "", reason = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ messages, stream: true, temperature: 0.3, top_p: 0.95 }),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await refusalOf(response));
    answer = show("assistant", "");
    answer.article.classList.add("going");
    for await (const event of events(response)) {
      if (event.error) throw new Error(explained(503, event.error));
      const choice = event.choices[0];
      if (choice?.delta.content) {
        text += choice.delta.content;
        added(() => answer.body.append(choice.delta.content));
      }
      reason = choice?.finish_reason || reason;
    }
    if (reason === "length") note(answer.article, "Cut: the answer has reached the longest that fits.");
    else if (reason === null) throw new Error("The connection ended before the answer did: ask again.");
  } catch (error) {
    const wasStopped = controller.signal.aborted;
    if (wasStopped && answer) note(answer.article, "Stopped.");
    else if (!wasStopped) say(error instanceof TypeError ? "The server cannot be reached: is it running?" : error.message);
    if (!text) {
      // It can be asked again, as it was typed.
      messages.pop();
      asked.article.remove();
      answer?.article.remove();
      if (!prompt.value) prompt.value = content;
    }
  } finally {
    answer?.article.classList.remove("going");
    if (text) messages.push({ role: "assistant", content: text });
    going = null;
    setGoing(false);
    fit();
  }
}

function setGoing(is) {
  find("send").hidden = is;
  find("stop").hidden = !is;
  if (!is && find("key-form").hidden) prompt.focus();
}

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

find("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = prompt.value.trim();
  if (!content || going) return;
  prompt.value = "";
  fit();
  ask(content);
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") going?.abort();
});
find("stop").addEventListener("click", () => going?.abort());
find("new").addEventListener("click", () => {
  going?.abort();
  messages.length = 0;
  log.querySelectorAll("article").forEach((each) => each.remove());
  find("empty").hidden = false;
  say("");
  prompt.focus();
});
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = find("key").value;
  find("key").value = "";
  find("key-form").hidden = true;
  prompt.focus();
  look();
});

function state(rows) {
  find("state").replaceChildren(...rows.map(([name, value, kind]) => {
    const row = document.createElement("div"), term = document.createElement("dt"), said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    if (kind) said.className = kind;
    row.append(term, said);
    return row;
  }));
}

async function look() {
  let session;
  try {
    const response = await fetch("session", { headers: headers() });
    if (!response.ok) {
      await refusalOf(response);
      return;
    }
    session = await response.json();
  } catch {
    state([["server", "cannot be reached", "bad"]]);
    return;
  }
  find("model").textContent = session.model;
  find("protects").textContent = `Mode ${session.mode}: ${session.protects}`;
  const rows = session.processes.map((each) => [each.role, each.state, each.is_well ? "good" : "bad"]);
  rows.push(["running", session.running], ["waiting", session.waiting]);
  if (session.pads) rows.push(["pads", `${session.pads.stock_rows} of ${session.pads.capacity_rows} rows`]);
  state(rows);
}

look();
setInterval(() => { if (!document.hidden) look(); }, 2000);
prompt.focus();
