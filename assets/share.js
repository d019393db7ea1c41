// The settings of the take that is shown, as a link: copied, or shown where a browser refuses.
const $ = (part) => element.querySelector(part);
const press = $(".press"), told = $(".told"), shown = $("input");
press.textContent = say.share;
shown.setAttribute("aria-label", say.link);

press.addEventListener("click", async () => {
  const link = new URL(props.link, location.origin + location.pathname).href;
  shown.hidden = true;
  told.textContent = "";
  try {
    await navigator.clipboard.writeText(link);
    told.textContent = say.copied;
  } catch {
    shown.value = link;
    shown.hidden = false;
    shown.focus();
    shown.select();
    told.textContent = say.copy;
  }
});
watch("link", () => {
  shown.hidden = true;
  told.textContent = "";
});
