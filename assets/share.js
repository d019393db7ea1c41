// Copy a link with the settings of the selected take, or show it where the browser refuses.
const $ = (part) => element.querySelector(part);
const button = $(".plain-button"), message = $(".message"), field = $("input");
button.textContent = text.share;
field.setAttribute("aria-label", text.link);

button.addEventListener("click", async () => {
  const link = new URL(props.link, location.origin + location.pathname).href;
  field.hidden = true;
  message.textContent = "";
  try {
    await navigator.clipboard.writeText(link);
    message.textContent = text.copied;
  } catch {
    field.value = link;
    field.hidden = false;
    field.focus();
    field.select();
    message.textContent = text.copy;
  }
});
watch("link", () => {
  field.hidden = true;
  message.textContent = "";
});
