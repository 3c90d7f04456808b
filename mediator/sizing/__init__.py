"""`mediator size`: from a user's files and options to what fits, in words and as a document.

The arithmetic itself is `optee.memory`.
"""
