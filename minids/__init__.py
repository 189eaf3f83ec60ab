"""minids: from a working transformer to a working mini-DeepSeek."""
