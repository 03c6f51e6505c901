// Command colors runs one service of the sample application: colors [flags] SERVICE.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/doppel-dev/doppel/examples/colors"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "colors:", err)
		os.Exit(1)
	}
}

func run() error {
	cfg := colors.Config{Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	flag.StringVar(&cfg.Color, "color", os.Getenv("COLOR"), "first `colour` of dataprocessingservice (default $COLOR, or green)")
	flag.StringVar(&cfg.Addr, "addr", os.Getenv("ADDR"), "`address` to listen on (default $ADDR, or the service's own port)")
	flag.StringVar(&cfg.DataProcessing, "dataprocessing", os.Getenv("DATAPROCESSING_URL"), "`URL` of dataprocessingservice")
	flag.StringVar(&cfg.DataStore, "datastore", os.Getenv("DATASTORE_URL"), "`URL` of verylargedatastore")
	flag.DurationVar(&cfg.Drain, "drain", 0, "how long to go on serving after SIGTERM (in a cluster a few seconds, so that a rolling restart drops nothing)")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: colors [flags] verylargejavaservice|dataprocessingservice|verylargedatastore")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	cfg.Service = flag.Arg(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it at once
	return colors.Run(ctx, cfg)
}
