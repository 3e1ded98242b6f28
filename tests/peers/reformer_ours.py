"""A reversible language model."""

import torch
from torch import nn

from revtrain import AdditiveCoupling, InvertibleChain


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x, mask):
        x = self.norm(x)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


class FeedForward(nn.Sequential):
    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class LanguageModel(nn.Module):
    def __init__(self, tokens=50, dim=32, depth=6, heads=4, length=24):
        super().__init__()
        self.embedding, self.position = nn.Embedding(tokens, dim), nn.Embedding(length, dim)
        blocks = nn.ModuleList()
        for _ in range(depth):
            f, g = Attention(dim, heads), FeedForward(dim)
            blocks.append(AdditiveCoupling(2 * dim, f, g, dim=-1))
        self.layers = InvertibleChain(blocks)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, tokens))

    def forward(self, text):
        length = text.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.embedding(text) + self.position(torch.arange(length))
        x = torch.cat([x, x], dim=-1)
        x = self.layers(x, mask)
        return self.head(torch.stack(x.chunk(2, dim=-1)).sum(dim=0))


def main(steps=10):
    torch.manual_seed(0)
    model = LanguageModel()
    text = torch.randint(50, (8, 25))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    print(main()[0])
