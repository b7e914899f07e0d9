// The page: what is seen, and what happens when something is pressed.

import { ApiError, model as askModel, setKey, stream } from "./api.js";
import { fill, icon } from "./icons.js";
import { draw } from "./map.js";
import { render } from "./markdown.js";
import * as settings from "./settings.js";
import { Conversation, Store } from "./tree.js";

const $ = (id) => document.getElementById(id);
const store = new Store(localStorage);
const values = settings.load();
const THEMES = { auto: "Automatic", light: "Light", dark: "Dark" };
const KEYS = [
  ["Enter", "send"],
  ["Shift Enter", "a new line"],
  ["Escape", "stop the answer, or close what is open"],
  ["↑ in an empty box", "edit the last message"],
  ["Alt ← →", "the versions of the last answer"],
  ["Alt R", "another answer"],
  ["Alt N", "a new conversation"],
  ["Alt B", "branches"],
  ["Alt ,", "settings"],
  ["/", "to the message box"],
  ["?", "these keys"],
];

let info = null; // of the model, once it answers
let here = new Conversation();
let running = null; // {abort, node, conversation}
let editing = null; // id of the message that is being edited
let follow = true; // whether the view stays at the end

const isChat = () => info === null || info.griffin.chat_template;

// ---- the list of conversations

function showList() {
  const wanted = $("search").value.trim().toLowerCase();
  const entries = store.conversations.filter(
    (each) =>
      each.roots.length &&
      (!wanted || `${each.title} ${Object.values(each.nodes).map((node) => node.text).join(" ")}`.toLowerCase().includes(wanted)),
  );
  $("conversations").replaceChildren(
    ...entries.map((each) => {
      const item = document.createElement("li");
      const open = document.createElement("button");
      open.className = "open";
      open.textContent = each.title || "Untitled";
      if (each.id === here.id) open.setAttribute("aria-current", "page");
      open.addEventListener("click", () => go(each));
      const remove = tool("trash", `Delete “${each.title}”`, () => removeConversation(each));
      item.append(open, remove);
      return item;
    }),
  );
}

function go(conversation) {
  here = conversation;
  editing = null;
  follow = true;
  history.replaceState(null, "", here.roots.length ? `#${here.id}` : "#");
  sidebar(false);
  showAll();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  if (matchMedia("(hover: hover)").matches) $("prompt").focus();
}

function removeConversation(conversation) {
  if (running?.conversation === conversation) running.abort.abort();
  store.remove(conversation.id);
  if (conversation === here) go(new Conversation());
  else showList();
  notice(`“${conversation.title || "Untitled"}” is deleted.`, "Undo", () => {
    store.conversations.push(conversation);
    save();
    go(conversation);
  });
}

// ---- messages

function showAll() {
  const path = here.path();
  document.title = here.title ? `${here.title} · Griffin` : "Griffin";
  $("title").textContent = here.title || "New conversation";
  $("messages").replaceChildren(...path.map(message));
  $("welcome").hidden = path.length > 0;
  $("download").disabled = !path.length;
  showList();
  showBranching();
  showMap();
  toEnd();
}

function showMap() {
  if (!$("map").hidden) {
    draw($("map-body"), here, (id) => {
      here.choose(id);
      save();
      showAll();
      if (matchMedia("(max-width: 900px)").matches) panel("map", false);
      document.getElementById(`m-${id}`)?.scrollIntoView({ block: "center" });
    });
  }
}

function tool(name, label, act) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "icon";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.append(icon(name));
  button.addEventListener("click", act);
  return button;
}

function message(node) {
  const item = document.createElement("li");
  item.id = `m-${node.id}`;
  item.className = `message ${node.role}`;
  if (editing === node.id) {
    item.append(editor(node));
    return item;
  }
  const body = document.createElement("div");
  body.className = "text";
  item.append(body);
  fillBody(body, node);
  const foot = document.createElement("div");
  foot.className = "foot";
  item.append(foot);
  fillFoot(foot, node);
  return item;
}

function fillBody(body, node) {
  if (node.role === "assistant" && isChat()) body.replaceChildren(render(node.text));
  else {
    body.classList.add("plain");
    body.textContent = node.text;
  }
  if (running?.node === node) {
    if (!node.text) body.replaceChildren(Object.assign(document.createElement("span"), { className: "thinking" }));
    else (body.lastElementChild ?? body).append(Object.assign(document.createElement("span"), { className: "caret" }));
  }
  if (node.error) {
    const error = Object.assign(document.createElement("p"), { className: "error", textContent: node.error });
    const again = Object.assign(document.createElement("button"), { type: "button", textContent: "Try again" });
    again.addEventListener("click", () => retry(node));
    error.append(again);
    body.append(error);
  }
}

function fillFoot(foot, node) {
  foot.replaceChildren();
  if (running?.node === node) return;
  const siblings = here.siblings(node);
  if (siblings.length > 1) {
    const at = siblings.indexOf(node.id);
    const group = Object.assign(document.createElement("span"), { className: "versions" });
    const turn = (by) => {
      here.step(node.id, by);
      save();
      showAll();
      document.getElementById(`m-${siblings[at + by]}`)?.querySelector(by < 0 ? ".back" : ".on")?.focus();
    };
    const back = tool("left", "The version before", () => turn(-1));
    const on = tool("right", "The next version", () => turn(1));
    back.classList.add("back");
    on.classList.add("on");
    back.disabled = at === 0;
    on.disabled = at === siblings.length - 1;
    group.append(back, Object.assign(document.createElement("span"), { textContent: `${at + 1}/${siblings.length}` }), on);
    foot.append(group);
  }
  const tools = Object.assign(document.createElement("span"), { className: "tools" });
  tools.append(tool("copy", "Copy", (event) => copy(node.text, event.currentTarget)));
  if (node.role === "user") {
    tools.append(tool("edit", "Edit: a new version of this message", () => edit(node.id)));
  } else {
    tools.append(tool("again", "Another answer (Alt R)", () => again(node)));
    tools.append(tool("fork", "Go on from here in a new branch", () => branch(node)));
  }
  foot.append(tools);
  if (node.meta) {
    const stats = Object.assign(document.createElement("span"), { className: "stats", textContent: node.meta.text });
    stats.title = node.meta.title;
    foot.append(stats);
  }
}

function editor(node) {
  const form = document.createElement("form");
  form.className = "editor";
  const area = document.createElement("textarea");
  area.value = node.text;
  area.setAttribute("aria-label", "Edit the message");
  const close = () => {
    editing = null;
    showAll();
    $("prompt").focus();
  };
  const apply = (event) => {
    event.preventDefault();
    if (!area.value.trim()) return;
    editing = null;
    const made = here.add(node.parent, "user", area.value);
    answer(made);
  };
  form.addEventListener("submit", apply);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) apply(event);
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    }
  });
  area.addEventListener("input", () => grow(area));
  const buttons = Object.assign(document.createElement("div"), { className: "buttons" });
  const cancel = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "Cancel" });
  cancel.addEventListener("click", close);
  buttons.append(cancel, Object.assign(document.createElement("button"), { className: "filled", textContent: "Send as a new version" }));
  form.append(area, buttons);
  queueMicrotask(() => {
    grow(area);
    area.focus();
  });
  return form;
}

function edit(id) {
  if (running) return;
  editing = id;
  showAll();
}

function branch(node) {
  here.endAt(node.id);
  save();
  showAll();
  $("prompt").focus();
}

function showBranching() {
  const last = here.path().at(-1);
  const branching = Boolean(last && last.children.length && !running);
  $("branching").hidden = !branching;
  if (branching) {
    $("branching-text").textContent = `A new branch: what you say now stands beside ${last.children.length === 1 ? "what came" : `the ${last.children.length} that came`} next.`;
  }
}

// ---- asking

function send(event) {
  event.preventDefault();
  const text = $("prompt").value;
  const path = here.path();
  if (running || (!text.trim() && (isChat() || !path.length))) return;
  $("prompt").value = "";
  grow($("prompt"));
  if (!here.title) here.title = text.trim().replace(/\s+/g, " ").slice(0, 60) || "Untitled";
  if (!store.conversations.includes(here)) store.conversations.push(here);
  const last = path.at(-1);
  if (last && last.role === "user") {
    last.error = undefined; // it was never answered
  }
  const made = here.add(last ? last.id : null, "user", text);
  history.replaceState(null, "", `#${here.id}`);
  follow = true;
  answer(made);
}

function again(node) {
  if (running || node.role !== "assistant") return;
  answer(here.nodes[node.parent]);
}

function retry(node) {
  if (running) return;
  const parent = here.nodes[node.parent];
  if (node.text) answer(parent);
  else {
    here.remove(node.id);
    answer(parent);
  }
}

function question(conversation, user) {
  const path = conversation.pathTo(user.id);
  const common = settings.body(values);
  if (!isChat()) return ["/v1/completions", { ...common, prompt: path.map((node) => node.text).join("") }];
  const messages = path.filter((node) => node.text).map((node) => ({ role: node.role, content: node.text }));
  if (values.system) messages.unshift({ role: "system", content: values.system });
  return ["/v1/chat/completions", { ...common, messages }];
}

async function answer(user) {
  const conversation = here;
  const node = conversation.add(user.id, "assistant", "");
  const abort = new AbortController();
  running = { abort, node, conversation };
  busy(true);
  showAll();
  save();
  const began = performance.now();
  let first = 0;
  let usage = null;
  let reason = null;
  let due = false;
  const paint = () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      const body = document.getElementById(`m-${node.id}`)?.querySelector(".text");
      if (body && conversation === here) {
        fillBody(body, node);
        toEnd();
      }
    });
  };
  try {
    const [path, body] = question(conversation, user);
    for await (const event of stream(path, body, abort.signal)) {
      if (event.usage) usage = event.usage;
      const choice = event.choices[0];
      if (!choice) continue;
      const text = choice.delta ? choice.delta.content ?? "" : choice.text;
      reason = choice.finish_reason ?? reason;
      if (text) {
        first ||= performance.now();
        node.text += text;
        paint();
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") await failed(error, node);
  }
  const ended = performance.now();
  if (first) node.meta = stats({ first: first - began, took: ended - first, usage, reason, stopped: abort.signal.aborted });
  running = null;
  if (!node.text && !node.error && abort.signal.aborted) conversation.remove(node.id);
  conversation.changed = Date.now();
  busy(false);
  save();
  if (conversation === here) showAll();
  else showList();
  $("live").textContent = node.error ? "The answer failed." : "The answer is complete.";
}

function stats({ first, took, usage, reason, stopped }) {
  const parts = [];
  const title = [`first token after ${(first / 1000).toFixed(2)} s`];
  if (usage) {
    const speed = usage.completion_tokens > 1 && took > 0 ? ((usage.completion_tokens - 1) * 1000) / took : 0;
    parts.push(`${usage.completion_tokens} tokens`);
    if (speed) parts.push(`${speed < 10 ? speed.toFixed(1) : Math.round(speed)} tokens/s`);
    const cached = usage.prompt_tokens_details?.cached_tokens;
    title.push(`${usage.prompt_tokens} tokens of prompt${cached ? `, ${cached} of them read before` : ""}`);
  }
  if (stopped) parts.push("stopped");
  else if (reason === "length") parts.push("at the limit");
  return { text: parts.join(" · "), title: title.join("; ") };
}

async function failed(error, node) {
  if (error instanceof ApiError && error.status === 401) {
    node.error = "This server asks for a key.";
    askKey(true);
  } else if (error instanceof ApiError) {
    const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
    node.error = `${error.message.replace(/\.?$/, ".")}${wait}`;
  } else node.error = "The server cannot be reached.";
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
}

// ---- small things

function save() {
  store.save();
  if (store.failed) notice("This browser's storage is full: the conversation is kept in this tab only. Delete old ones.");
  showList();
}

let noticeTimer = 0;
function notice(text, action, act) {
  const box = $("notice");
  box.replaceChildren(Object.assign(document.createElement("span"), { textContent: text }));
  if (action) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: action });
    button.addEventListener("click", () => {
      box.hidden = true;
      act();
    });
    box.append(button);
  }
  box.hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => (box.hidden = true), 8000);
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    notice("This browser does not let the page copy here.");
    return;
  }
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
}

function grow(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight * 0.4)}px`;
}

function toEnd() {
  if (follow) $("scroll").scrollTop = $("scroll").scrollHeight;
  showDown();
}

function showDown() {
  const scroll = $("scroll");
  $("down").hidden = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 120;
}

function sidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  $("scrim").hidden = !open;
}

function panel(name, open = $(name).hidden) {
  for (const each of ["map", "settings"]) {
    const wanted = each === name && open;
    $(each).hidden = !wanted;
    $(`${each}-open`).setAttribute("aria-expanded", String(wanted));
  }
  if (open && name === "settings") {
    settings.form($("settings-form"), values, () => settings.save(values), isChat());
    if (matchMedia("(hover: hover)").matches) $("settings-form").querySelector("input, textarea").focus();
  }
  showMap();
}

function theme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme-name").textContent = THEMES[name];
  localStorage.setItem("griffin.theme", name);
}

function download() {
  const lines = [`# ${here.title}`];
  for (const node of here.path()) lines.push(`**${node.role === "user" ? "You" : "Model"}**`, node.text.trim());
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${lines.join("\n\n")}\n`], { type: "text/markdown" }));
  link.download = `${here.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 50) || "conversation"}.md`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function askKey(wrong) {
  $("key-error").hidden = !wrong || !sessionStorage.getItem("griffin.key");
  $("key").value = "";
  $("key-dialog").showModal();
}

function bytes(count) {
  return count < 1e6 ? `${Math.round(count / 1e3)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

async function connect() {
  for (;;) {
    try {
      info = await askModel();
      break;
    } catch (error) {
      if (error.status === 401) {
        askKey(Boolean(sessionStorage.getItem("griffin.key")));
        return;
      }
      $("hint").textContent = error.status === 503 ? "The model is being loaded…" : "The server cannot be reached. Trying again…";
      await new Promise((done) => setTimeout(done, 1500));
    }
  }
  const facts = info.griffin;
  document.body.classList.toggle("continues", !isChat());
  $("model-name").textContent = info.id;
  $("memory").textContent = facts.state_bytes ? `memory ${bytes(facts.state_bytes)}` : "";
  $("memory").title = `The model remembers a conversation in ${bytes(facts.state_bytes ?? 0)}, however long it gets.`;
  $("hint").textContent = isChat() ? "" : "This model continues text. Enter in an empty box lets it go on.";
  $("prompt").placeholder = isChat() ? `Message ${info.id}` : "Begin a text";
  $("welcome-title").textContent = isChat() ? "What shall we talk about?" : "Begin a text, and the model goes on";
  $("welcome-text").textContent = facts.state_bytes
    ? `${info.id} remembers a whole conversation in ${bytes(facts.state_bytes)}, however long it gets.`
    : info.id;
  const starters = isChat()
    ? ["Explain recurrence to a child", "Write a haiku about memory", "What is a griffin?"]
    : ["ROMEO.\n", "Once upon a time", "The king"];
  $("starters").replaceChildren(
    ...starters.map((text) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text.trim() });
      button.addEventListener("click", () => {
        $("prompt").value = text;
        $("composer").requestSubmit();
      });
      return button;
    }),
  );
  showAll();
}

// ---- what is pressed

fill();
theme(localStorage.getItem("griffin.theme") in THEMES ? localStorage.getItem("griffin.theme") : "auto");
$("keys").append(
  ...KEYS.flatMap(([key, text]) => [
    Object.assign(document.createElement("dt"), { textContent: key }),
    Object.assign(document.createElement("dd"), { textContent: text }),
  ]),
);
$("composer").addEventListener("submit", send);
$("prompt").addEventListener("input", () => grow($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !/Android|iPhone|iPad/.test(navigator.userAgent)) send(event);
  if (event.key === "ArrowUp" && !$("prompt").value) {
    const last = here.path().findLast((node) => node.role === "user");
    if (last) {
      event.preventDefault();
      edit(last.id);
    }
  }
});
$("stop").addEventListener("click", () => running?.abort.abort());
$("new-chat").addEventListener("click", () => go(new Conversation()));
$("search").addEventListener("input", showList);
$("open-sidebar").addEventListener("click", () => sidebar(true));
for (const id of ["close-sidebar", "scrim"]) $(id).addEventListener("click", () => sidebar(false));
for (const name of ["map", "settings"]) {
  $(`${name}-open`).addEventListener("click", () => panel(name));
  $(`${name}-close`).addEventListener("click", () => panel(name, false));
}
$("branching-cancel").addEventListener("click", () => {
  const last = here.path().at(-1);
  here.choose(last.children.at(-1));
  save();
  showAll();
});
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const now = document.documentElement.dataset.theme ?? "auto";
  theme(names[(names.indexOf(now) + 1) % names.length]);
});
$("download").addEventListener("click", download);
$("help-open").addEventListener("click", () => $("help").showModal());
$("down").addEventListener("click", () => {
  follow = true;
  toEnd();
});
$("scroll").addEventListener("scroll", () => {
  const scroll = $("scroll");
  follow = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
  showDown();
});
$("messages").addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy=code]");
  if (button) copy(button.closest(".code").querySelector("pre").textContent, button);
});
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "ok") return;
  setKey($("key").value.trim());
  connect();
});
addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA)$/.test(event.target.tagName);
  const last = here.path().at(-1);
  if (event.key === "Escape" && running) running.abort.abort();
  else if (event.key === "Escape") {
    sidebar(false);
    panel("map", false);
  } else if (event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight") && last && !running) {
    event.preventDefault();
    if (here.step(last.id, event.key === "ArrowLeft" ? -1 : 1)) {
      save();
      showAll();
    }
  } else if (event.altKey && event.code === "KeyR" && last?.role === "assistant") {
    event.preventDefault();
    again(last);
  } else if (event.altKey && event.code === "KeyN") {
    event.preventDefault();
    go(new Conversation());
  } else if (event.altKey && event.code === "KeyB") {
    event.preventDefault();
    panel("map");
  } else if (event.altKey && event.code === "Comma") {
    event.preventDefault();
    panel("settings");
  } else if (!typing && event.key === "/" && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    $("prompt").focus();
  } else if (!typing && event.key === "?") $("help").showModal();
});
addEventListener("storage", (event) => {
  // Another tab: its conversations appear here too; the one that is open stays as it is.
  if (event.key !== "griffin.conversations.1") return;
  store.load();
  const same = store.conversations.findIndex((each) => each.id === here.id);
  if (same >= 0 && running) store.conversations[same] = here;
  else if (same >= 0) here = store.conversations[same];
  if (!running) showAll();
});

const wanted = location.hash.slice(1);
here = store.conversations.find((each) => each.id === wanted) ?? here;
for (const each of store.conversations) {
  // An answer that was being written when the page was closed has no end: it stays as far as it got.
  for (const node of Object.values(each.nodes)) {
    if (node.role === "assistant" && !node.text && !node.error) each.remove(node.id);
  }
}
showAll();
connect();
