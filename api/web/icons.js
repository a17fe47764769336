// The icons of the pages: 24 x 24 line drawings, whose colour and width come from the class "icon". They are in the
// script, not in separate files, so that icons that appear later need no request to the server.

/** Shapes by icon name, each with a tag and its attributes. */
export const ICONS = {
  menu: [["path", { d: "M4 7h16M4 12h16M4 17h10" }]],
  plus: [["path", { d: "M12 5v14M5 12h14" }]],
  send: [["path", { d: "M12 19V5M6 11l6-6 6 6" }]],
  stop: [["rect", { x: "7", y: "7", width: "10", height: "10", rx: "1.5", fill: "currentColor" }]],
  copy: [
    ["rect", { x: "9", y: "9", width: "11", height: "11", rx: "2" }],
    ["path", { d: "M5.5 15H5a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1h9a1 1 0 0 1 1 1v.5" }],
  ],
  check: [["path", { d: "M5 12.5l4.5 4.5L19 7.5" }]],
  refresh: [["path", { d: "M19.5 12a7.5 7.5 0 1 1-2.3-5.4L19.5 9M19.5 4.5V9H15" }]],
  edit: [["path", { d: "M4.5 19.5l.9-4L15.9 5a1.8 1.8 0 0 1 2.5 0l.6.6a1.8 1.8 0 0 1 0 2.5L8.5 18.6zM14 7l3 3" }]],
  trash: [["path", { d: "M5 7h14M10 7V5h4v2M7 7l.8 12h8.4L17 7M10.5 10.5v5M13.5 10.5v5" }]],
  download: [["path", { d: "M12 5v10M7.5 11l4.5 4.5 4.5-4.5M5 19h14" }]],
  sliders: [
    ["path", { d: "M4 8h7M15 8h5M4 16h3M11 16h9" }],
    ["circle", { cx: "13", cy: "8", r: "2" }],
    ["circle", { cx: "9", cy: "16", r: "2" }],
  ],
  sun: [
    ["circle", { cx: "12", cy: "12", r: "3.8" }],
    ["path", { d: "M12 3.5v2M12 18.5v2M3.5 12h2M18.5 12h2M6 6l1.4 1.4M16.6 16.6L18 18M18 6l-1.4 1.4M7.4 16.6L6 18" }],
  ],
  moon: [["path", { d: "M19.5 14.2A7.8 7.8 0 0 1 9.8 4.5a7.8 7.8 0 1 0 9.7 9.7z" }]],
  close: [["path", { d: "M6 6l12 12M18 6L6 18" }]],
  chevron: [["path", { d: "M9 6l6 6-6 6" }]],
  down: [["path", { d: "M12 5v14M6 13l6 6 6-6" }]],
  key: [
    ["circle", { cx: "8", cy: "15", r: "3.5" }],
    ["path", { d: "M10.5 12.5L18.5 4.5M15 8l2.5 2.5" }],
  ],
  chat: [["path", { d: "M5 5h14a1 1 0 0 1 1 1v9a1 1 0 0 1-1 1h-7l-4.5 3.5V16H5a1 1 0 0 1-1-1V6a1 1 0 0 1 1-1z" }]],
  chart: [["path", { d: "M4 5v14h16M8 14l3.5-4 3 2.5L20 7" }]],
  book: [["path", { d: "M12 7c-2-1.5-4.5-2-8-2v12.5c3.5 0 6 .5 8 2 2-1.5 4.5-2 8-2V5c-3.5 0-6 .5-8 2zM12 7v12.5" }]],
  tool: [["path", { d: "M8 6l-5 6 5 6M16 6l5 6-5 6M13.5 5l-3 14" }]],
  thought: [
    ["path", { d: "M9.5 18h5M10.5 21h3M12 3.5a6 6 0 0 0-3.5 10.9c.6.5 1 1.2 1 2h5c0-.8.4-1.5 1-2A6 6 0 0 0 12 3.5z" }],
  ],
  clip: [
    [
      "path",
      { d: "M19 11.5l-7.3 7.3a4.4 4.4 0 0 1-6.2-6.2l7.8-7.8a2.9 2.9 0 0 1 4.1 4.1l-7.5 7.5a1.4 1.4 0 0 1-2-2L14.5 8" },
    ],
  ],
  file: [["path", { d: "M7 4h6.5L18 8.5V20H7a1 1 0 0 1-1-1V5a1 1 0 0 1 1-1zM13 4v5h5M9 13h6M9 16.5h4" }]],
  bookmark: [["path", { d: "M7 4.5h10a.5.5 0 0 1 .5.5v15L12 15.8 6.5 20V5a.5.5 0 0 1 .5-.5z" }]],
  search: [
    ["circle", { cx: "11", cy: "11", r: "6" }],
    ["path", { d: "M15.5 15.5L20 20" }],
  ],
  upload: [["path", { d: "M12 15V5M7.5 9.5L12 5l4.5 4.5M5 19h14" }]],
  previous: [["path", { d: "M15 6l-6 6 6 6" }]],
  next: [["path", { d: "M9 6l6 6-6 6" }]],
  resume: [["path", { d: "M5 6v12M9 6.5l9.5 5.5L9 17.5z" }]],
  alert: [["path", { d: "M12 4.5l8.5 14.5h-17zM12 10v4.5M12 16.8v.2" }]],
};
