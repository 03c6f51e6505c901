// Command doppel-rootd does what needs root on the laptop: it creates the TUN device and sets addresses, routes and DNS for doppel's user daemon.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/rootd"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/xlog"
)

func main() {
	var cfg rootd.Config
	flag.StringVar(&cfg.Socket, "socket", rootapi.DefaultSocket, "listen on this unix socket")
	flag.IntVar(&cfg.UID, "uid", rootd.NoUID, "allow this user besides root")
	flag.BoolVar(&cfg.Service, "service", false, "allow the members of group "+rootd.Group)
	logFile := flag.String("log", "", "append the log to this file instead of standard error")
	version := flag.Bool("version", false, "print the version and exit")
	flag.Parse()
	if *version {
		fmt.Println("doppel-rootd", buildinfo.String())
		return
	}
	if err := run(cfg, *logFile, flag.Args()); err != nil {
		e := uerr.From(err)
		fmt.Fprintln(os.Stderr, "doppel-rootd: error:", e.Msg)
		if e.Hint != "" {
			fmt.Fprintln(os.Stderr, "doppel-rootd: hint:", e.Hint)
		}
		os.Exit(e.Kind.ExitCode())
	}
}

func run(cfg rootd.Config, logFile string, args []string) error {
	if len(args) > 0 {
		return uerr.New(uerr.Usage, "see doppel-rootd -h", "unexpected argument %q", args[0])
	}
	log, err := rootd.OpenLog(logFile, cfg.UID)
	if err != nil {
		return err
	}
	cfg.Log, cfg.Level = xlog.New(log, "doppel-rootd")
	srv, err := rootd.New(cfg)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return srv.Run(ctx)
}
