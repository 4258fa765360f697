// The slider of the documentation: images that were drawn beforehand, one for each budget.
document.querySelectorAll(".slider").forEach((box) => {
  const steps = JSON.parse(box.querySelector("script").textContent);
  const input = box.querySelector("input");
  const image = box.querySelector("img");
  const output = box.querySelector("output");
  const show = () => {
    const step = steps[Number(input.value)];
    image.src = image.dataset.folder + step.image;
    image.alt = `A photograph cut into ${step.tokens} patches`;
    output.textContent =
      `${step.budget}: ${step.tokens} tokens. The model says "${step.label}", ${(100 * step.score).toFixed(1)} %.`;
  };
  input.max = String(steps.length - 1);
  input.addEventListener("input", show);
  show();
});
