// Markdown to DOM nodes. Text becomes text nodes, never HTML: whatever a model writes, nothing of it runs or is fetched.

const MOST_INLINE = 4000; // characters of a paragraph that are looked through for marks: the search may be quadratic
const SAFE = /^(https?:|mailto:)/i;

export function render(text) {
  const root = document.createDocumentFragment();
  blocks(text.replace(/\r\n?/g, "\n").split("\n"), root, 0);
  return root;
}

function element(name, parent, className) {
  const made = document.createElement(name);
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function blocks(lines, parent, depth) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = line.match(/^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/);
    if (!line.trim()) at += 1;
    else if (fence) at = code(lines, at, fence, parent);
    else if (/^ {0,3}#{1,6}\s/.test(line)) {
      const [, marks, content] = line.match(/^ {0,3}(#{1,6})\s+(.*?)\s*#*$/);
      inline(content, element(`h${Math.min(6, marks.length + 2)}`, parent));
      at += 1;
    } else if (/^ {0,3}([-*_])( *\1){2,} *$/.test(line)) {
      element("hr", parent);
      at += 1;
    } else if (depth < 8 && /^ {0,3}>/.test(line)) {
      const inner = [];
      while (at < lines.length && /^ {0,3}>/.test(lines[at])) inner.push(lines[at++].replace(/^ {0,3}> ?/, ""));
      blocks(inner, element("blockquote", parent), depth + 1);
    } else if (depth < 8 && item(line)) at = list(lines, at, parent, depth);
    else if (line.includes("|") && /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/.test(lines[at + 1] ?? "")) {
      at = table(lines, at, parent);
    } else at = paragraph(lines, at, parent);
  }
}

function code(lines, at, [, marks, language], parent) {
  const body = [];
  let end = at + 1;
  while (end < lines.length && !lines[end].trimStart().startsWith(marks)) body.push(lines[end++]);
  const figure = element("div", parent, "code");
  const head = element("div", figure, "code-head");
  element("span", head).textContent = language.trim().split(/\s/)[0] || "text";
  const copy = element("button", head, "copy");
  copy.type = "button";
  copy.textContent = "Copy";
  const inner = element("code", element("pre", figure));
  inner.textContent = body.join("\n");
  copy.dataset.copy = "code";
  return end + 1;
}

function item(line) {
  return line.match(/^( *)([-*+]|\d{1,9}[.)])( +)(.*)$/);
}

function list(lines, at, parent, depth) {
  const [, indent, mark] = item(lines[at]);
  const ordered = /\d/.test(mark);
  const made = element(ordered ? "ol" : "ul", parent);
  if (ordered && parseInt(mark, 10) !== 1) made.start = parseInt(mark, 10);
  while (at < lines.length) {
    const found = item(lines[at]);
    if (!found || found[1].length !== indent.length || /\d/.test(found[2]) !== ordered) break;
    const width = found[1].length + found[2].length + found[3].length;
    const inner = [found[4]];
    at += 1;
    while (at < lines.length) {
      const line = lines[at];
      const inside = line.startsWith(" ".repeat(indent.length + 2));
      if (!line.trim()) {
        const next = lines[at + 1] ?? "";
        if (!next.startsWith(" ".repeat(indent.length + 2)) || !next.trim()) break;
        inner.push("");
      } else if (inside) inner.push(line.slice(Math.min(width, line.search(/\S/))));
      else if (item(line) || /^ {0,3}(#|>|```)/.test(line)) break;
      else inner.push(line);
      at += 1;
    }
    const entry = element("li", made);
    if (inner.length === 1) inline(inner[0], entry);
    else blocks(inner, entry, depth + 1);
    if (at < lines.length && !lines[at].trim() && item(lines[at + 1] ?? "")) at += 1;
  }
  return at;
}

function table(lines, at, parent) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const sides = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const made = element("table", element("div", parent, "table"));
  const row = (line, name, where) => {
    const out = element("tr", where);
    cells(line).forEach((cell, column) => inline(cell, element(name, out, sides[column])));
  };
  row(lines[at], "th", element("thead", made));
  const body = element("tbody", made);
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) row(lines[at], "td", body);
  return at;
}

function paragraph(lines, at, parent) {
  const made = element("p", parent);
  const begin = at;
  while (at < lines.length && lines[at].trim()) {
    if (at > begin && (/^ {0,3}(#{1,6}\s|>|`{3,}|~{3,})/.test(lines[at]) || item(lines[at]))) break;
    if (at > begin) element("br", made);
    inline(lines[at].trim(), made);
    at += 1;
  }
  return at;
}

// Code first, then links, then emphasis: what is inside one is not read again as another.
const INLINE =
  /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|!?\[([^\[\]]*)\]\(([^()\s]*(?:\([^()\s]*\))?[^()\s]*)(?:\s+"[^"]*")?\)|\bhttps?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]}]|\\([\\`*_{}\[\]()#+\-.!~|>])|(\*\*|__)(?=\S)([\s\S]*?\S)\6|(\*|_)(?=\S)([\s\S]*?\S)\8|~~(?=\S)([\s\S]*?\S)~~/;

function inline(text, parent, depth = 0) {
  while (text) {
    const found = depth < 8 && text.length <= MOST_INLINE ? text.match(INLINE) : null;
    if (!found) {
      parent.append(text);
      return;
    }
    const before = text.slice(0, found.index);
    parent.append(before);
    const [all, tick, codeText, label, target, escaped, strong, strongText, em, emText, struck] = found;
    text = text.slice(found.index + all.length);
    if (em === "_" && (/\w$/.test(before) || /^\w/.test(text))) parent.append(all); // snake_case
    else if (tick) element("code", parent).textContent = codeText.trim() || codeText;
    else if (label !== undefined) link(target, label || target, parent, depth);
    else if (escaped) parent.append(escaped);
    else if (strong) inline(strongText, element("strong", parent), depth + 1);
    else if (em) inline(emText, element("em", parent), depth + 1);
    else if (struck) inline(struck, element("s", parent), depth + 1);
    else link(all, all, parent, 8);
  }
}

// An image is a link too: nothing is loaded from an address that a model wrote.
function link(target, label, parent, depth) {
  if (!SAFE.test(target)) {
    inline(label, parent, depth + 1);
    return;
  }
  const made = element("a", parent);
  made.href = target;
  made.target = "_blank";
  made.rel = "noopener noreferrer nofollow";
  made.title = target;
  inline(label, made, Math.max(depth + 1, 1));
}
