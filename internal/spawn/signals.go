package spawn

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// outlives says that the program was started to outlive its terminal (nohup). Only at first: a signal that was asked for once is no longer ignored.
var outlives = signal.Ignored(syscall.SIGHUP)

// Interruptible returns a context that ends when the program is told to: by the interrupt key, by kill, or since its terminal has gone.
func Interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, Ends(os.Interrupt, syscall.SIGTERM)...)
}

// Ends are the signals with that of a terminal that goes, unless the program was started to outlive it.
func Ends(signals ...os.Signal) []os.Signal {
	if outlives {
		return signals
	}
	return append(signals, syscall.SIGHUP)
}
