package httproute

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/match"
)

// BenchmarkPassThrough compares requests that match nothing with the same through a bare splice proxy, and with the app alone, over TCP on loopback. The three
// take turns, so that what else the machine does meets all of them; the medians of the ratios are reported: of-bare and of-app are 1 if splitting costs nothing.
func BenchmarkPassThrough(b *testing.B) {
	for _, row := range []struct {
		name              string
		version           int
		clients, requests int // of each client in a round
		size              int
		chunked           bool
	}{
		{"http1/small", 1, 1, 200, 64, false},
		{"http1/small-8", 1, 8, 50, 64, false},
		{"http1/bulk", 1, 1, 4, 32 << 20, false},
		{"http1/chunked", 1, 1, 4, 32 << 20, true},
		{"http2/small", 2, 1, 200, 64, false},
		{"http2/small-8", 2, 8, 50, 64, false},
		{"http2/bulk", 2, 1, 4, 32 << 20, false},
	} {
		b.Run(row.name, func(b *testing.B) {
			app := benchServer(b, row.size, row.chunked)
			ways := []string{app, benchProxy(b, app, bare), benchProxy(b, app, split)}
			clients := make([]*http.Client, len(ways))
			for i := range ways {
				tr := &http.Transport{Protocols: new(http.Protocols), MaxIdleConnsPerHost: row.clients, ReadBufferSize: 64 << 10}
				tr.Protocols.SetHTTP1(row.version == 1)
				tr.Protocols.SetUnencryptedHTTP2(row.version == 2)
				clients[i] = &http.Client{Transport: tr}
				b.Cleanup(tr.CloseIdleConnections)
			}
			round := func(i int) time.Duration {
				began := time.Now()
				var wg sync.WaitGroup
				for range row.clients {
					wg.Go(func() {
						for range row.requests {
							benchGet(b, clients[i], ways[i], row.size)
						}
					})
				}
				wg.Wait()
				return time.Since(began)
			}
			for i := range ways {
				round(i)
			}
			var ofApp, ofBare []float64
			for b.Loop() {
				var took [3]float64
				for i := range took {
					k := (i + len(ofApp)) % len(took)
					took[k] = float64(round(k))
				}
				ofApp, ofBare = append(ofApp, took[0]/took[2]), append(ofBare, took[1]/took[2])
			}
			b.SetBytes(3 * int64(row.clients*row.requests*row.size))
			b.ReportMetric(median(ofApp), "of-app")
			b.ReportMetric(median(ofBare), "of-bare")
		})
	}
}

func median(x []float64) float64 {
	slices.Sort(x)
	return x[len(x)/2]
}

func benchGet(b *testing.B, c *http.Client, addr string, size int) {
	r, err := c.Get("http://" + addr)
	if err != nil {
		b.Error(err)
		return
	}
	n, err := io.Copy(io.Discard, r.Body)
	r.Body.Close()
	if err != nil || n != int64(size) {
		b.Errorf("%d of %d bytes, %v", n, size, err)
	}
}

func bare(_ context.Context, c flow.Stream, app string) {
	up, err := net.Dial("tcp", app)
	if err != nil {
		c.Reset()
		return
	}
	flow.Relay(c, flow.FromTCP(up.(*net.TCPConn)))
}

func split(ctx context.Context, c flow.Stream, app string) {
	m, _ := match.Compile(match.Rule{Headers: []match.Header{{Name: "x-id", Text: match.Text{Op: match.Equal, Value: "lou"}}}})
	Serve(ctx, c, Config{
		Pick: func(h match.Head) string {
			if m.Match(h) {
				return "lou"
			}
			return App
		},
		Rest: func() string { return App },
		Open: func(context.Context, string) (flow.Stream, error) {
			up, err := net.Dial("tcp", app)
			if err != nil {
				return nil, err
			}
			return flow.FromTCP(up.(*net.TCPConn)), nil
		},
	})
}

// benchProxy accepts connections for fn and returns its address.
func benchProxy(b *testing.B, app string, fn func(context.Context, flow.Stream, string)) string {
	l := listen(b)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go fn(b.Context(), flow.FromTCP(c.(*net.TCPConn)), app)
		}
	}()
	return l.Addr().String()
}

func benchServer(b *testing.B, size int, chunked bool) string {
	l := listen(b)
	body := make([]byte, size)
	srv := &http.Server{Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !chunked {
			w.Header().Set("Content-Length", fmt.Sprint(size))
		}
		for part := range slices.Chunk(body, 16<<10) {
			w.Write(part)
		}
	})}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(l)
	b.Cleanup(func() { srv.Close() })
	return l.Addr().String()
}
