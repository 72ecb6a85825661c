"""What matters to a chain on a cluster: learned from Slurm and the machine, judged, and mended.

facts        what is known, as plain values
texts        what programs print -> values (pure)
questions    asks Slurm's clients, torch in a child process, the driver
disk         tries what runs need of the file system
probe        a small job that looks around on a compute node
checks_…     facts -> findings, each with its remedy (pure)
way          how the next job gets into the queue, with the reasons (pure)
verdict      what follows for the chain, and for the exit code (pure)

Used by `hpcresume doctor`. Nothing here raises for what it finds, imports torch, or waits for
longer than it says.
"""
