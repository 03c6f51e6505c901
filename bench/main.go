// Command bench measures doppel on the lab beside the other ways to the same pod, and writes docs/performance.md from what it has measured.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

const usage = `usage:
  bench run [-plan lan|wan|scale] [-rounds N] [-only REGEXP] [-out FILE] [-lab NAME] [-keep]   measure, as root, on a lab (make bench)
  bench report [-dir DIR] FILE...         write DIR/performance.md and its pictures from what was measured
  bench serve [NAME]                      the server that is measured against: in a pod, and on a laptop
  bench splice LISTEN TARGET              a proxy that does nothing but copy, to compare the agent with
  bench allocs COMMITTED MEASURED         compare allocations of Go benchmarks (make bench-allocs)
  bench timed COMMAND [ARG...]            how long a command takes, as JSON
  bench client -work WORK -addr ADDRESS   one measurement, as JSON; in whatever network it is started in`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	commands := map[string]func(context.Context, []string) error{"run": run, "report": report, "allocs": allocs, "serve": serve, "splice": splice, "timed": timed, "client": client}
	if len(os.Args) < 2 || commands[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	if err := commands[os.Args[1]](ctx, os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
