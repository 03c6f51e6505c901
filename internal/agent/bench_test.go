package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/flow"
)

// BenchmarkIdle compares an agent without intercepts with a bare splice proxy, and with the app alone, over TCP on loopback. They take turns, and the
// medians of the ratios are reported: of-bare is 1 if an idle agent costs what such a proxy does.
func BenchmarkIdle(b *testing.B) {
	for _, row := range []struct {
		name               string
		conns, asks, bytes int // connections one after the other, what each asks for and how often
	}{
		{"connections", 200, 1, 64},
		{"small", 1, 400, 64},
		{"bulk", 1, 4, 32 << 20},
	} {
		b.Run(row.name, func(b *testing.B) {
			app := benchApp(b, row.bytes)
			bare := benchListen(b, func(c *net.TCPConn) {
				up, err := net.Dial("tcp", app)
				if err != nil {
					c.Close()
					return
				}
				flow.Relay(flow.FromTCP(c), flow.FromTCP(up.(*net.TCPConn)))
			})
			ways := []string{app, bare, benchAgent(b, app)}
			var ofApp, ofBare []float64
			for b.Loop() {
				var took [3]float64
				for i := range took {
					k := (i + len(ofApp)) % len(took)
					began := time.Now()
					for range row.conns {
						benchAsk(b, ways[k], row.asks, row.bytes)
					}
					took[k] = float64(time.Since(began))
				}
				ofApp, ofBare = append(ofApp, took[0]/took[2]), append(ofBare, took[1]/took[2])
			}
			slices.Sort(ofApp)
			slices.Sort(ofBare)
			b.ReportMetric(ofApp[len(ofApp)/2], "of-app")
			b.ReportMetric(ofBare[len(ofBare)/2], "of-bare")
		})
	}
}

// benchAgent serves a port without intercepts and returns its address.
func benchAgent(b *testing.B, app string) string {
	addr, err := net.ResolveTCPAddr("tcp", app)
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	a := &Agent{up: &uplink{}, cfg: Config{Log: slog.New(slog.DiscardHandler)}}
	a.table.init()
	p := &port{cfg: agentcfg.Port{Protocol: "TCP", ContainerPort: uint16(addr.Port)}, listener: l.(*net.TCPListener)}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.serve(ctx, a) }()
	b.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	})
	return l.Addr().String()
}

// benchApp answers each byte with n.
func benchApp(b *testing.B, n int) string {
	answer := make([]byte, n)
	return benchListen(b, func(c *net.TCPConn) {
		defer c.Close()
		ask := make([]byte, 1)
		for {
			if _, err := io.ReadFull(c, ask); err != nil {
				return
			}
			if _, err := c.Write(answer); err != nil {
				return
			}
		}
	})
}

func benchListen(b *testing.B, serve func(*net.TCPConn)) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c.(*net.TCPConn))
		}
	}()
	return l.Addr().String()
}

func benchAsk(b *testing.B, addr string, asks, bytes int) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 64<<10)
	for range asks {
		if _, err := c.Write([]byte("?")); err != nil {
			b.Fatal(err)
		}
		for got := 0; got < bytes; {
			n, err := c.Read(buf)
			if got += n; err != nil {
				b.Fatal(fmt.Errorf("%d of %d bytes: %w", got, bytes, err))
			}
		}
	}
}
