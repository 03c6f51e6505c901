// Command doppel-relay shows what laptops run in their clusters' place to people with a link.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/relay"
	"github.com/doppel-dev/doppel/internal/xlog"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "doppel-relay: error:", err)
		os.Exit(1)
	}
}

func run() error {
	log, _ := xlog.New(os.Stderr, "doppel-relay")
	cfg := relay.Config{Log: log, Out: os.Stdout}
	cfg.OIDC.ClientSecret = os.Getenv("DOPPEL_RELAY_OIDC_SECRET")
	cfg.Flags(flag.CommandLine)
	backup := flag.String("backup", "", "write a copy of the database into this new file and exit; the relay may be running")
	from := flag.String("import", "", "copy what the database in this `FILE` knows into the relay's own, which is empty, and exit; no relay may be running")
	reset := flag.String("reset", "", "print a link with which the account of this e-mail `ADDRESS` gets another password, and exit; the relay may be running")
	printCA := flag.Bool("print-ca", false, "print the certificate of the built-in CA and exit")
	version := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if flag.NArg() > 0 { // flags behind it were not read
		return fmt.Errorf("%q is no flag, and nothing else is taken", flag.Arg(0))
	}
	if cfg.Database == "" {
		cfg.Database = os.Getenv("DOPPEL_RELAY_DATABASE")
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	switch {
	case *version:
		fmt.Println("doppel-relay", buildinfo.String())
		return nil
	case *printCA:
		return relay.PrintCA(cfg.DataDir, os.Stdout)
	case *reset != "":
		return relay.Reset(ctx, cfg, *reset)
	case *backup != "":
		return relay.Backup(ctx, cfg.DataDir, cfg.Database, *backup)
	case *from != "":
		return relay.Import(ctx, cfg.DataDir, cfg.Database, *from)
	}
	r, err := relay.New(ctx, cfg)
	if err != nil {
		return err
	}
	return r.Run(ctx)
}
