"use strict";
(() => {
  const by = (id) => document.getElementById(id);
  const data = JSON.parse(by("particles").textContent);
  const types = { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array };
  const thousands = (n) => n.toLocaleString("en-GB");
  const shortly = (x) => (+x.toPrecision(3)).toString().replace("-", "−");

  function decoded(text, bits) {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new types[bits](bytes.buffer);
  }

  const rows = decoded(data.rows, 32); // particles drawn, 0-based
  const classes = decoded(data.class, 16);
  const micrographs = data.micrograph ? decoded(data.micrograph, 16) : null;
  const usable = new Uint8Array(data.particles).fill(1);
  for (const row of decoded(data.unusable, 32)) usable[row] = 0;
  const nUsable = usable.reduce((sum, is) => sum + is, 0);
  const axes = new Map(data.axes.map((axis) => [axis.key, axis]));

  // An axis with its numbers: of those drawn, and of all n particles where the page holds them.
  function values(axis) {
    const numbers = (text, bits) => {
      const step = (axis.high - axis.low) / (2 ** bits - 1);
      return Float32Array.from(decoded(text, bits), (q) => axis.low + q * step);
    };
    if (typeof axis.drawn === "string") axis.drawn = numbers(axis.drawn, 16);
    if (typeof axis.all === "string") axis.all = numbers(axis.all, axis.bits);
    return axis;
  }

  // A test of points (x, y) for lying in a polygon [[x, y], …]: a ray to the right crosses an odd number of
  // edges. Edges are kept by bands of y, which makes a million tests quick.
  function insideOf(polygon) {
    const ys = polygon.map((corner) => corner[1]), low = Math.min(...ys), high = Math.max(...ys);
    const bands = Array.from({ length: 256 }, () => []);
    const band = (y) => Math.min(255, Math.floor((256 * (y - low)) / (high - low)));
    polygon.forEach(([xa, ya], i) => {
      const [xb, yb] = polygon[(i + 1) % polygon.length];
      if (ya === yb) return;
      const edge = { low: Math.min(ya, yb), high: Math.max(ya, yb), x: xa, y: ya, slope: (xb - xa) / (yb - ya) };
      for (let k = band(edge.low); k <= band(edge.high); k++) bands[k].push(edge);
    });
    return (x, y) => {
      if (!(y >= low && y < high)) return false;
      let odd = false;
      for (const edge of bands[band(y)]) {
        if (y >= edge.low && y < edge.high && x < edge.x + (y - edge.y) * edge.slope) odd = !odd;
      }
      return odd;
    };
  }

  // ---- Colours

  const viridis = ["440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
  const mix = (a, b, t) => Math.round(parseInt(a, 16) * (1 - t) + parseInt(b, 16) * t);
  const ramp = Array.from({ length: 64 }, (_, i) => {
    const place = (i / 63) * (viridis.length - 1), k = Math.min(Math.floor(place), viridis.length - 2);
    const part = (o) => mix(viridis[k].substr(o, 2), viridis[k + 1].substr(o, 2), place - k);
    return `rgb(${part(0)},${part(2)},${part(4)})`;
  });
  const wheel = Array.from({ length: 64 }, (_, i) => `hsl(${(i * 360) / 64},55%,55%)`);

  // Of each particle drawn, which colour; robust ends for numbers, the whole circle for psi.
  function colouring(key) {
    if (key === "class") return { palette: data.colours, index: classes.map((c) => c - 1) };
    if (key === "micrograph") {
      const last = Math.max(data.micrographs.length - 1, 1);
      const ends = [data.micrographs[0], data.micrographs[data.micrographs.length - 1]];
      return { palette: ramp, index: micrographs.map((m) => Math.round((63 * m) / last)), ends };
    }
    const axis = values(axes.get(key));
    const cyclic = key === "psi";
    const sorted = Float32Array.from(axis.drawn).sort();
    const at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
    const low = cyclic ? -180 : at(0.01), high = cyclic ? 180 : at(0.99);
    const scale = high > low ? 63 / (high - low) : 0;
    const turned = (v) => (cyclic ? ((v + 180) % 360 + 360) % 360 - 180 : v);
    const index = Uint8Array.from(axis.drawn, (v) => Math.max(0, Math.min(63, Math.round((turned(v) - low) * scale))));
    const text = (v) => shortly(v) + (axis.unit ? " " + axis.unit : "");
    return { palette: cyclic ? wheel : ramp, index, ends: [text(low), text(high)] };
  }

  // ---- The plot

  const points = by("points"), overlay = by("overlay"), tip = by("tip");
  const margin = { left: 52, right: 14, top: 14, bottom: 42 };
  const view = {};
  let chosen = null; // sorted 1-based numbers
  let lasso = [];
  let chosenDrawn = null;

  const order = Uint32Array.from(rows, (_, i) => i); // drawn in random order, so that no class hides another
  for (let i = order.length - 1, seed = 1; i > 0; i--) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const j = seed % (i + 1);
    [order[i], order[j]] = [order[j], order[i]];
  }

  function span(drawn) {
    let low = Infinity, high = -Infinity;
    for (const v of drawn) { if (v < low) low = v; if (v > high) high = v; }
    if (!(high > low)) { low -= 0.5; high = low + 1; }
    const room = 0.04 * (high - low);
    return [low - room, high + room];
  }

  function ticks(low, high) {
    const power = 10 ** Math.floor(Math.log10((high - low) / 5));
    const step = [1, 2, 5, 10].map((s) => s * power).find((s) => (high - low) / s <= 7);
    const found = [];
    for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step);
    return found;
  }

  const toX = (v) => margin.left + ((v - view.x[0]) / (view.x[1] - view.x[0])) * view.width;
  const toY = (v) => margin.top + (1 - (v - view.y[0]) / (view.y[1] - view.y[0])) * view.height;
  const fromX = (px) => view.x[0] + ((px - margin.left) / view.width) * (view.x[1] - view.x[0]);
  const fromY = (py) => view.y[0] + (1 - (py - margin.top) / view.height) * (view.y[1] - view.y[0]);

  function pen(canvas) {
    const { clientWidth, clientHeight } = canvas, ratio = window.devicePixelRatio || 1;
    canvas.width = clientWidth * ratio;
    canvas.height = clientHeight * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    return context;
  }

  function drawPoints() {
    const c = pen(points), style = getComputedStyle(document.documentElement);
    view.width = points.clientWidth - margin.left - margin.right;
    view.height = points.clientHeight - margin.top - margin.bottom;
    drawAxes(c, style);
    const { palette, index } = view.colours, size = rows.length > 6000 ? 2 : rows.length > 1500 ? 3.4 : 5;
    for (const i of order) {
      c.globalAlpha = chosenDrawn ? (chosenDrawn[i] ? 1 : 0.18) : 0.75;
      c.fillStyle = palette[index[i]];
      const x = toX(view.across.drawn[i]), y = toY(view.up.drawn[i]);
      if (size < 3) c.fillRect(x - size / 2, y - size / 2, size, size);
      else { c.beginPath(); c.arc(x, y, size / 2, 0, 7); c.fill(); }
    }
    c.globalAlpha = 1;
    if (by("colour").value === "class") labelClasses(c, style);
  }

  function drawAxes(c, style) {
    const right = margin.left + view.width, bottom = margin.top + view.height;
    c.font = "12px system-ui, sans-serif";
    c.strokeStyle = style.getPropertyValue("--rule");
    c.fillStyle = style.getPropertyValue("--soft");
    c.textAlign = "center";
    for (const v of ticks(...view.x)) {
      const x = Math.round(toX(v)) + 0.5;
      c.beginPath(); c.moveTo(x, margin.top); c.lineTo(x, bottom); c.stroke();
      c.fillText(shortly(v), x, bottom + 16);
    }
    c.textAlign = "right";
    for (const v of ticks(...view.y)) {
      const y = Math.round(toY(v)) + 0.5;
      c.beginPath(); c.moveTo(margin.left, y); c.lineTo(right, y); c.stroke();
      c.fillText(shortly(v), margin.left - 7, y + 4);
    }
    const name = (axis) => axis.label + (axis.unit ? ` (${axis.unit})` : "");
    c.fillStyle = style.getPropertyValue("--ink");
    c.textAlign = "center";
    c.fillText(name(view.across), margin.left + view.width / 2, bottom + 34);
    c.save();
    c.translate(13, margin.top + view.height / 2);
    c.rotate(-Math.PI / 2);
    c.fillText(name(view.up), 0, 0);
    c.restore();
  }

  function labelClasses(c, style) {
    const n = data.colours.length, x = new Float64Array(n), y = new Float64Array(n), count = new Uint32Array(n);
    for (let i = 0; i < rows.length; i++) {
      const k = classes[i] - 1;
      x[k] += view.across.drawn[i]; y[k] += view.up.drawn[i]; count[k]++;
    }
    c.font = "600 12px system-ui, sans-serif";
    c.textAlign = "center";
    c.lineWidth = 4;
    c.lineJoin = "round";
    c.strokeStyle = style.getPropertyValue("--halo");
    c.fillStyle = style.getPropertyValue("--ink");
    for (let k = 0; k < n; k++) {
      if (count[k] === 0) continue;
      const px = toX(x[k] / count[k]), py = toY(y[k] / count[k]) + 4;
      c.strokeText(k + 1, px, py);
      c.fillText(k + 1, px, py);
    }
    c.lineWidth = 1;
  }

  function drawOverlay(hovered) {
    const c = pen(overlay), style = getComputedStyle(document.documentElement);
    c.strokeStyle = style.getPropertyValue("--ink");
    if (lasso.length > 1) {
      c.lineWidth = 1.5;
      c.setLineDash([5, 4]);
      c.beginPath();
      lasso.forEach(([x, y], i) => (i ? c.lineTo(toX(x), toY(y)) : c.moveTo(toX(x), toY(y))));
      c.closePath();
      c.stroke();
      c.setLineDash([]);
    }
    if (hovered !== undefined) {
      c.lineWidth = 2;
      c.beginPath();
      c.arc(toX(view.across.drawn[hovered]), toY(view.up.drawn[hovered]), 6, 0, 7);
      c.stroke();
    }
  }

  function drawLegend() {
    const legend = by("legend"), { palette, ends } = view.colours;
    legend.replaceChildren();
    if (!ends) { legend.textContent = "Colours and numbers as on the classes above."; return; }
    const bar = document.createElement("div"), text = document.createElement("div");
    bar.className = "ramp";
    bar.style.background = `linear-gradient(to right, ${palette.join(",")})`;
    text.className = "ends";
    for (const end of ends) text.appendChild(document.createElement("span")).textContent = end;
    legend.append(bar, text);
  }

  function redraw() {
    view.across = values(axes.get(by("across").value));
    view.up = values(axes.get(by("up").value));
    view.x = span(view.across.drawn);
    view.y = span(view.up.drawn);
    view.colours = colouring(by("colour").value);
    drawLegend();
    drawPoints();
    drawOverlay();
    const drawn = rows.length;
    const allOfZ = data.axes.every((axis) => axis.all || !/^z\d/.test(axis.key));
    const coarse = view.across.bits === 8 ? " Positions are rounded to 1/255 of an axis." : "";
    by("sampling").textContent = drawn === nUsable
      ? `All ${thousands(drawn)} usable particles are drawn.`
      : `${thousands(drawn)} of ${thousands(nUsable)} usable particles are drawn, a fixed random sample. ` +
        (view.across.all && view.up.all
          ? "A list drawn on these axes takes all of them." + coarse
          : `A list drawn on these axes takes only those drawn${allOfZ ? "; on the axes of z it takes all" : ""}.`);
  }

  // ---- Choosing

  // 1-based numbers of the particles in a polygon in the units of the axes.
  function select(polygon) {
    const complete = Boolean(view.across.all && view.up.all);
    const x = complete ? view.across.all : view.across.drawn, y = complete ? view.up.all : view.up.drawn;
    const inside = insideOf(polygon), found = [];
    for (let i = 0; i < x.length; i++) {
      const row = complete ? i : rows[i];
      if (usable[row] && inside(x[i], y[i])) found.push(row + 1);
    }
    return found;
  }

  function choose(numbers) {
    chosen = numbers && numbers.length ? numbers : null;
    const taken = new Uint8Array(data.particles);
    for (const number of chosen || []) taken[number - 1] = 1;
    chosenDrawn = chosen ? Uint8Array.from(rows, (row) => taken[row]) : null;
    const share = chosen ? (100 * chosen.length) / nUsable : 0;
    by("count").textContent = chosen
      ? `${thousands(chosen.length)} particle${chosen.length === 1 ? "" : "s"} chosen (${share.toFixed(1)}\u00a0%).`
      : "No particle chosen.";
    by("save").disabled = by("clear").disabled = !chosen;
    by("then").hidden = !chosen;
    drawPoints();
  }

  function save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([chosen.join("\n") + "\n"], { type: "text/plain" }));
    link.download = "particles.txt";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function nearest(px, py) {
    let best, closest = 100; // within 10 px
    for (let i = 0; i < rows.length; i++) {
      const dx = toX(view.across.drawn[i]) - px, dy = toY(view.up.drawn[i]) - py, d = dx * dx + dy * dy;
      if (d < closest) { closest = d; best = i; }
    }
    return best;
  }

  function showTip(i, px, py) {
    tip.hidden = i === undefined;
    if (tip.hidden) return;
    const line = (text) => { tip.appendChild(document.createElement("div")).textContent = text; };
    tip.replaceChildren();
    tip.appendChild(document.createElement("b")).textContent = `Particle ${thousands(rows[i] + 1)}`;
    line(`class ${classes[i]}, merit ${shortly(values(axes.get("merit")).drawn[i])}`);
    if (micrographs) line(data.micrographs[micrographs[i]]);
    const picture = document.querySelector(`.card[data-class="${classes[i]}"] img`);
    if (picture) tip.appendChild(picture.cloneNode());
    const flipX = px > points.clientWidth / 2, flipY = py > points.clientHeight / 2;
    tip.style.left = flipX ? "" : `${px + 14}px`;
    tip.style.right = flipX ? `${points.clientWidth - px + 14}px` : "";
    tip.style.top = flipY ? "" : `${py + 14}px`;
    tip.style.bottom = flipY ? `${points.clientHeight - py + 14}px` : "";
  }

  const place = (event) => {
    const box = overlay.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let drawing = false;

  overlay.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    try { overlay.setPointerCapture(event.pointerId); } catch { /* a scripted pointer cannot be captured */ }
    drawing = true;
    showTip();
    const [px, py] = place(event);
    lasso = [[fromX(px), fromY(py)]];
  });
  overlay.addEventListener("pointermove", (event) => {
    const [px, py] = place(event);
    if (drawing) {
      const [x, y] = lasso[lasso.length - 1];
      if (Math.hypot(toX(x) - px, toY(y) - py) >= 3) lasso.push([fromX(px), fromY(py)]);
      drawOverlay();
    } else {
      const found = nearest(px, py);
      drawOverlay(found);
      showTip(found, px, py);
    }
  });
  overlay.addEventListener("pointerup", (event) => {
    if (!drawing) return;
    drawing = false;
    if (lasso.length < 3) { lasso = []; drawOverlay(); choose(null); return; }
    const found = select(lasso);
    choose(event.shiftKey && chosen ? [...new Set([...chosen, ...found])].sort((a, b) => a - b) : found);
  });
  overlay.addEventListener("pointercancel", () => { drawing = false; lasso = []; drawOverlay(); });
  overlay.addEventListener("pointerleave", () => { if (!drawing) { showTip(); drawOverlay(); } });
  by("save").addEventListener("click", save);
  by("clear").addEventListener("click", () => { lasso = []; drawOverlay(); choose(null); });

  function offer(id, options, value) {
    for (const [key, label] of options) by(id).add(new Option(label, key, key === value, key === value));
    by(id).addEventListener("change", () => { lasso = []; redraw(); });
  }

  const listed = data.axes.map((axis) => [axis.key, axis.label]);
  const start = axes.has("z3") ? ["pc1", "pc2"] : axes.has("z2") ? ["z1", "z2"] : listed.map((axis) => axis[0]);
  offer("across", listed, start[0]);
  offer("up", listed, start[1]);
  offer("colour", [["class", "class"], ...listed, ...(micrographs ? [["micrograph", "micrograph"]] : [])], "class");
  redraw();
  const again = () => { drawPoints(); drawOverlay(); };
  new ResizeObserver(again).observe(points);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  // Not the overlay: Chromium prints a canvas that is cleared here as opaque, over the points.
  window.addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); drawPoints(); });
  window.addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); again(); });

  // ---- Classes to keep

  const keep = by("keep"), cards = [...document.querySelectorAll(".card")];
  // 1, 2, 3, 5 as 1-3,5
  function ranges(numbers) {
    const parts = [];
    for (const n of numbers) {
      const last = parts[parts.length - 1];
      if (last && last[1] === n - 1) last[1] = n;
      else parts.push([n, n]);
    }
    return parts.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
  }
  document.querySelector(".cards").addEventListener("change", () => {
    const kept = cards.filter((card) => card.querySelector("input").checked);
    const size = kept.reduce((sum, card) => sum + +card.dataset.size, 0);
    keep.hidden = kept.length === 0;
    keep.querySelector("span").textContent =
      `${kept.length} class${kept.length === 1 ? "" : "es"}, ${thousands(size)} particles:`;
    keep.querySelector("code").textContent = keep.dataset.command + ranges(kept.map((card) => +card.dataset.class));
  });
  by("propose")?.addEventListener("click", () => {
    for (const card of cards) card.querySelector("input").checked = !card.querySelector(".against");
    cards[0].dispatchEvent(new Event("change", { bubbles: true }));
  });

  // ---- Traversals

  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const players = [...document.querySelectorAll(".traversal")].map((figure) => {
    const strip = figure.querySelector(".strip img"), canvas = figure.querySelector("canvas");
    const steps = JSON.parse(figure.dataset.values), slider = figure.querySelector("input");
    const button = figure.querySelector("button"), mark = figure.querySelector("i");
    const player = { playing: !still && steps.length > 1, frame: 0, way: 1 };
    mark.style.width = `${100 / steps.length}%`;
    player.show = (frame) => {
      player.frame = frame;
      slider.value = frame;
      mark.style.left = `${(100 * frame) / steps.length}%`;
      figure.querySelector("output").textContent = `= ${steps[frame].toFixed(2).replace("-", "−")}`;
      const tile = strip.naturalHeight;
      if (!tile) return;
      if (canvas.width !== tile) canvas.width = canvas.height = tile;
      canvas.getContext("2d").drawImage(strip, frame * tile, 0, tile, tile, 0, 0, tile, tile);
    };
    player.step = () => {
      if (player.frame + player.way < 0 || player.frame + player.way >= steps.length) player.way = -player.way;
      player.show(player.frame + player.way);
    };
    const label = () => { button.textContent = player.playing ? "Pause" : "Play"; };
    button.addEventListener("click", () => { player.playing = !player.playing; label(); });
    slider.addEventListener("input", () => { player.playing = false; label(); player.show(+slider.value); });
    label();
    strip.decode().then(() => player.show(0));
    return player;
  });
  setInterval(() => { for (const player of players) if (player.playing) player.step(); }, 130);
})();
