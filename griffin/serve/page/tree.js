// A conversation is a tree: every edit, every other answer and every fork is a branch. Kept in this browser.

const KEY = "griffin.conversations.1";

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(10)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Conversation {
  constructor(data = {}) {
    this.id = data.id ?? newId();
    this.title = data.title ?? "";
    this.changed = data.changed ?? Date.now();
    this.nodes = data.nodes ?? {}; // id -> {id, parent, role, text, children, chosen, ...}
    this.roots = data.roots ?? []; // ids of first messages
    this.chosenRoot = data.chosenRoot ?? null;
  }

  add(parent, role, text, more = {}) {
    const node = { id: newId(), parent, role, text, children: [], chosen: null, ...more };
    this.nodes[node.id] = node;
    this.siblings(node).push(node.id);
    this.choose(node.id);
    this.changed = Date.now();
    return node;
  }

  siblings(node) {
    return node.parent === null ? this.roots : this.nodes[node.parent].children;
  }

  // Make the path lead through a node.
  choose(id) {
    for (let node = this.nodes[id]; node; node = this.nodes[node.parent]) {
      if (node.parent === null) this.chosenRoot = node.id;
      else this.nodes[node.parent].chosen = node.id;
    }
  }

  // End the path at a node: what comes next is a branch.
  endAt(id) {
    if (id === null) this.chosenRoot = null;
    else {
      this.choose(id);
      this.nodes[id].chosen = null;
    }
  }

  step(id, by) {
    const siblings = this.siblings(this.nodes[id]);
    const next = siblings[siblings.indexOf(id) + by];
    if (next) this.choose(next);
    return Boolean(next);
  }

  path() {
    const path = [];
    for (let node = this.nodes[this.chosenRoot]; node; node = this.nodes[node.chosen]) path.push(node);
    return path;
  }

  pathTo(id) {
    const path = [];
    for (let node = this.nodes[id]; node; node = this.nodes[node.parent]) path.unshift(node);
    return path;
  }

  remove(id) {
    const node = this.nodes[id];
    for (const child of [...node.children]) this.remove(child);
    const siblings = this.siblings(node);
    const at = siblings.indexOf(id);
    siblings.splice(at, 1);
    const next = siblings[Math.min(at, siblings.length - 1)] ?? null;
    if (node.parent === null) this.chosenRoot = this.chosenRoot === id ? next : this.chosenRoot;
    else if (this.nodes[node.parent].chosen === id) this.nodes[node.parent].chosen = next;
    delete this.nodes[id];
  }
}

export class Store {
  constructor(storage) {
    this.storage = storage;
    this.failed = null; // why the last save was not one
    this.conversations = [];
    this.load();
  }

  load() {
    let found = [];
    try {
      found = JSON.parse(this.storage.getItem(KEY) ?? "[]");
    } catch {
      found = [];
    }
    this.conversations = (Array.isArray(found) ? found : []).map((data) => new Conversation(data));
  }

  save() {
    this.conversations.sort((a, b) => b.changed - a.changed);
    try {
      this.storage.setItem(KEY, JSON.stringify(this.conversations.filter((each) => each.roots.length)));
      this.failed = null;
    } catch (error) {
      this.failed = error;
    }
  }

  remove(id) {
    this.conversations = this.conversations.filter((each) => each.id !== id);
    this.save();
  }
}
