from batchinfer.cli import main

main(prog_name="batchinfer")
