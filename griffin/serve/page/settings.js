// Sampling settings: what is asked of the server with every message. Kept in this browser.

const KEY = "griffin.settings.1";

export const FIELDS = [
  { name: "system", label: "System message", kind: "text", chat: true, note: "Said to the model before everything." },
  { name: "max_tokens", label: "Longest answer", kind: "number", min: 1, max: 131072, step: 1, value: 512, unit: "tokens" },
  { name: "temperature", label: "Temperature", kind: "range", min: 0, max: 2, step: 0.05, value: 0.8, note: "0 always takes the likeliest token." },
  { name: "top_p", label: "Top p", kind: "range", min: 0.05, max: 1, step: 0.05, value: 0.95, off: 1 },
  { name: "top_k", label: "Top k", kind: "range", min: 0, max: 200, step: 1, value: 0, off: 0 },
  { name: "min_p", label: "Min p", kind: "range", min: 0, max: 0.5, step: 0.01, value: 0, off: 0 },
  { name: "repetition_penalty", label: "Repetition penalty", kind: "range", min: 1, max: 2, step: 0.05, value: 1, off: 1 },
  { name: "presence_penalty", label: "Presence penalty", kind: "range", min: -2, max: 2, step: 0.1, value: 0, off: 0 },
  { name: "frequency_penalty", label: "Frequency penalty", kind: "range", min: -2, max: 2, step: 0.1, value: 0, off: 0 },
  { name: "seed", label: "Seed", kind: "number", min: 0, max: 2147483647, step: 1, value: "", note: "Empty: another one each time." },
  { name: "stop", label: "Stop at", kind: "text", value: "", note: "Up to four strings, one a line." },
];

export function load() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
  } catch {
    kept = {};
  }
  return Object.fromEntries(FIELDS.map((field) => [field.name, kept[field.name] ?? field.value ?? ""]));
}

export function save(values) {
  try {
    localStorage.setItem(KEY, JSON.stringify(values));
  } catch {
    // full: the settings hold for this page
  }
}

// What goes into a request; neutral values are left out.
export function body(values) {
  const made = {};
  for (const field of FIELDS) {
    const value = values[field.name];
    if (field.name === "system" || value === "" || value === field.off) continue;
    if (field.name === "stop") {
      const stops = value.split("\n").filter(Boolean).slice(0, 4);
      if (stops.length) made.stop = stops;
    } else made[field.name] = value;
  }
  return made;
}

export function form(root, values, changed, isChat) {
  root.replaceChildren();
  for (const field of FIELDS) {
    if (field.chat && !isChat) continue;
    const label = document.createElement("label");
    const head = document.createElement("span");
    head.className = "label";
    head.textContent = field.label;
    const shown = document.createElement("output");
    const input = document.createElement(field.kind === "text" ? "textarea" : "input");
    if (field.kind === "text") input.rows = field.name === "stop" ? 2 : 3;
    else Object.assign(input, { type: field.kind, min: field.min, max: field.max, step: field.step });
    input.name = field.name;
    input.value = values[field.name];
    const show = () => {
      shown.textContent = values[field.name] === field.off ? "off" : field.kind === "range" ? input.value : field.unit ?? "";
    };
    input.addEventListener("input", () => {
      if (field.kind === "text") values[field.name] = input.value;
      else if (input.value === "") values[field.name] = "";
      else if (input.checkValidity()) values[field.name] = Number(input.value);
      show();
      changed();
    });
    show();
    head.append(shown);
    label.append(head, input);
    if (field.note) {
      const note = document.createElement("small");
      note.textContent = field.note;
      label.append(note);
    }
    root.append(label);
  }
  const reset = document.createElement("button");
  reset.type = "button";
  reset.className = "quiet";
  reset.textContent = "As they were at first";
  reset.addEventListener("click", () => {
    for (const field of FIELDS) values[field.name] = field.value ?? "";
    changed();
    form(root, values, changed, isChat);
  });
  root.append(reset);
}
