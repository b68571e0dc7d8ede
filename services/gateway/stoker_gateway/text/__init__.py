"""Text of tokens and tokens of text: pure, and bounded in what it holds back."""
