// The tree of a conversation, drawn: one line a message, branches indented, the present path marked.

export function draw(root, conversation, choose) {
  root.replaceChildren();
  const onPath = new Set(conversation.path().map((node) => node.id));
  const list = document.createElement("ul");
  list.className = "tree";
  const walk = (id, parent) => {
    // A run without branches stays on one level: only forks indent.
    let node = conversation.nodes[id];
    for (;;) {
      parent.append(entry(node, onPath.has(node.id), conversation, choose));
      if (node.children.length !== 1) break;
      node = conversation.nodes[node.children[0]];
    }
    for (const child of node.children) {
      const branch = document.createElement("ul");
      const item = document.createElement("li");
      item.className = onPath.has(child) ? "branch here" : "branch";
      item.append(branch);
      parent.append(item);
      walk(child, branch);
    }
  };
  if (conversation.roots.length === 1) walk(conversation.roots[0], list);
  else {
    for (const id of conversation.roots) {
      const branch = document.createElement("ul");
      const item = document.createElement("li");
      item.className = onPath.has(id) ? "branch here" : "branch";
      item.append(branch);
      list.append(item);
      walk(id, branch);
    }
  }
  root.append(list);
}

function entry(node, here, conversation, choose) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.className = `node ${node.role}${here ? " here" : ""}`;
  const who = document.createElement("b");
  who.textContent = node.role === "user" ? "You" : "Model";
  const text = document.createElement("span");
  text.textContent = node.text.trim().replace(/\s+/g, " ").slice(0, 90) || "…";
  button.append(who, text);
  if (here) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => choose(node.id));
  item.append(button);
  return item;
}
