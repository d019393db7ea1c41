// What a browser tab keeps over a reload: the values of the forms, the open tab, and a token that
// lets the studio recognise the tab, and with it its takes. Stored in the tab's session storage.
window.studioSession = (() => {
  const KEY = "ace-music-studio";
  let kept = {};
  try {
    kept = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
  } catch { /* no storage, or a damaged one: start empty */ }
  const type = performance.getEntriesByType("navigation")[0]?.type;
  let forms = { ...kept.forms }, tab = kept.tab, token = null;
  const write = () => {
    if (token === null) return;  // the kept values are not back in the forms yet
    try {
      sessionStorage.setItem(KEY, JSON.stringify({ token, tab, forms }));
    } catch { /* no storage, or a full one: nothing is kept */ }
  };
  // A page out of the browser's memory has lost its connection: the studio let go of its tab.
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  return {
    kept,
    // Whether the page came back by Reload, Back or Forward.
    resumed: kept.token !== undefined && (type === "reload" || type === "back_forward"),
    start: (given) => { token = given; write(); },
    storeTab: (id) => { tab = id; write(); },
    store: (mode, names, values) => {
      forms[mode] = Object.fromEntries(names.map((name, i) => [name, values[i]]));
      write();
    },
  };
})();
