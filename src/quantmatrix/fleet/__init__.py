"""Fleet: the cells of every hardware of a Ray cluster, run there, their records brought together here.

Ray places tasks, retries what a dying node lost, and watches memory; nothing here does. A task is one
checkpoint on one hardware, and what goes over the wire is plain data:

    driver                                     a node of that hardware
    ------                                     -----------------------
    cells -> groups, the longest first
    suites and tables as text  --------------> a temporary folder
    ids of cells               --------------> pytest, in a process of its own, with Ray's device
    records are judged         <-------------- records and JUnit as text
    and merged whole

| module       | what it does |
| ------------ | ------------ |
| `groups`     | which cells make a task, and in which order |
| `bundle`     | suites, tables and limits as one text, so that every node runs the driver's |
| `answers`    | the forms of what a node may say |
| `on_node`    | a node's side: what it is, and the run of a group |
| `child`      | the pytest plugin of that run: tells its steps, ends when its parent does |
| `cluster`    | which nodes have which hardware, and what a task asks Ray for |
| `engine`     | every call of Ray |
| `intake`     | judges what a node sent: nothing in it is trusted |
| `driver`     | the loop |
| `progress`   | how far it is, for people and as a file |

Ray is imported inside functions of `engine` alone: nothing else of the package needs it.
"""
