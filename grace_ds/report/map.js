const maps = Array.from(document.querySelectorAll("figure.map"));
if (maps.length) {
  const points = JSON.parse(document.getElementById("points").textContent);
  const card = document.querySelector("#point pre");
  const order = points.left.map((_, i) => i).sort((a, b) => points.left[a] - points.left[b] || a - b);
  let at = -1;
  const show = (i) => {
    at = i;
    card.textContent = points.texts[i];
    for (const map of maps) {
      const image = map.querySelector("img"), spot = map.querySelector(".spot");
      spot.style.left = points.left[i] * image.clientWidth + "px";
      spot.style.top = points.top[i] * image.clientHeight + "px";
      spot.hidden = false;
    }
  };
  const point = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    let best = -1, least = 24 * 24;
    points.left.forEach((left, i) => {
      const x = box.left + left * box.width - event.clientX, y = box.top + points.top[i] * box.height - event.clientY;
      if (x * x + y * y < least) { best = i; least = x * x + y * y; }
    });
    if (best >= 0) show(best);
  };
  for (const map of maps) {
    const image = map.querySelector("img");
    image.addEventListener("pointermove", point);
    image.addEventListener("click", point);
    map.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      show(order[(order.indexOf(at) + step + order.length) % order.length]);
    });
  }
}
