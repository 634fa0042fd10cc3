"""TensorBoard's layout of charts."""

from typing import Any

SCORES = {  # title: (what is scored, tags)
    "FID and rFID": ("fid", "eval/fid.*", "eval/rfid.*"),
    "KID": ("kid", r"eval/kid\d.*"),
    "inception score": ("is", r"eval/is\d.*"),
    "precision and recall": ("prdc", "eval/precision.*", "eval/recall.*"),
    "density and coverage": ("prdc", "eval/density.*", "eval/coverage.*"),
    "PSNR": ("reconstruct", "eval/psnr.*"),
    "prior gap": ("reconstruct", "eval/prior_gap.*"),
    "spectrum of codes": ("reconstruct", "eval/spectrum.*"),
    "FID of translations": ("translate", "eval/fid.*"),
    "PSNR of cycles": ("translate", "eval/cycle_psnr.*"),
}


def chart_layout(players: list[str], scored: set[str]) -> dict[str, Any]:
    """Return a layout for `SummaryWriter.add_custom_scalars`.

    It shows related scores in one chart, each discriminator's loss with its chance level and its accuracies, and each
    row of a ternary discriminator's confusion matrix.

    Args:
        players: names of the system's players
        scored: what evaluations score: reconstruct, translate, and of samples fid, is, kid, prdc
    """
    charts = {title: ["Multiline", tags] for title, (use, *tags) in SCORES.items() if use in scored}
    layout = {"scores": charts} if charts else {}
    for mode in ("binary", "ternary"):
        if mode in players:
            layout[mode] = {
                "loss and chance": ["Multiline", [f"{mode}/(./)?discriminator_loss", f"{mode}/(./)?chance"]],
                "accuracy": ["Multiline", [f"{mode}/.*accuracy/.*"]],
            }
    if "ternary" in players:
        for kind in ("real", "reconstructed", "generated"):
            layout["ternary"][f"{kind} images are named"] = ["Multiline", [f"ternary/named/{kind}/.*"]]
    return layout
