"""The head that two published scorers share: five linear layers with nothing between them.

Trained with dropout between the layers, it is one affine function of its input when used.

Shape suffixes: N images, D width of the input.
"""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
"""Where the linear layers stand among the dropouts; their names in the published files."""


class AffineHead(nn.Module):
    """From vectors to one number each; its tensors are called layers.0.weight and so on."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, *WIDTHS)
        self.layers = nn.ModuleDict(
            {str(place): nn.Linear(widths[i], widths[i + 1]) for i, place in enumerate(PLACES)}
        )

    def forward(self, vectors_ND: Tensor) -> Tensor:
        """scores_N."""
        x = vectors_ND
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]
