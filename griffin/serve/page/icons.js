// Icons as paths of a 24 x 24 grid, drawn here so that nothing is loaded.

const PATHS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  menu: "M4 7h16M4 12h16M4 17h10",
  up: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  stop: "M7 7h10v10H7z",
  tree: "M6 8.500v7M6 11c0 0 0 1 3 1h4c3 0 5-1 5-3.500M8.500 6a2.500 2.500 0 1 1-5 0 2.500 2.500 0 0 1 5 0zM8.500 18a2.500 2.500 0 1 1-5 0 2.500 2.500 0 0 1 5 0zM20.500 6a2.500 2.500 0 1 1-5 0 2.500 2.500 0 0 1 5 0z",
  sliders: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.500v5M9 14.500v5",
  download: "M12 4v11M7 11l5 5 5-5M5 20h14",
  theme: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
  keys: "M4 7h16v10H4zM8 11h.01M12 11h.01M16 11h.01M8 14h8",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  edit: "M5 19h3L19 8l-3-3L5 16zM14 7l3 3",
  again: "M19 12a7 7 0 1 1-2.300-5.200M19 4v4h-4",
  fork: "M12 20v-6M12 14c0-4-6-4-6-9M12 14c0-4 6-4 6-9M3.500 7.500L6 5l2.500 2.500M15.500 7.500L18 5l2.500 2.500",
  trash: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  more: "M12 6v12M6 12h12",
};

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

export function fill(root = document) {
  for (const place of root.querySelectorAll("[data-icon]")) place.prepend(icon(place.dataset.icon));
}
