"""What `llmkit <command>` understands: one function a command, which adds its parser. Nothing heavy is imported here.

A command's work lies in the module that its parser names, and is imported when the command runs.
"""
