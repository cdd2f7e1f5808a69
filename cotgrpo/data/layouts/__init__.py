"""Layouts of rows: which columns hold each field, chats, and a user's own columns and row function. docs/data.md."""
