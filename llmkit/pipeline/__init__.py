"""Many stages in one YAML: a graph of recipes and commands that is run where something is new, and only there.

`config` is what the file says, `graph` its nodes in order, `keys` what a node's result depends on, `state` what is kept of
every node, `runner` what is decided and done, `forecast` what it will take, `command` what is printed.
"""
