// Paper is white: a page in its dark theme is printed in its light one.
addEventListener("beforeprint", () => {
  const page = document.documentElement.dataset;
  page.themeOnScreen = page.theme;
  page.theme = "light";
});
addEventListener("afterprint", () => {
  const page = document.documentElement.dataset;
  page.theme = page.themeOnScreen;
  delete page.themeOnScreen;
});
