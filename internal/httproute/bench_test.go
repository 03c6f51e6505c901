package httproute

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/match"
)

// BenchmarkPassThrough compares requests that match nothing with a bare splice proxy, over TCP on loopback.
func BenchmarkPassThrough(b *testing.B) {
	serve := map[string]func(ctx context.Context, c flow.Stream, app string){
		"bare": func(ctx context.Context, c flow.Stream, app string) {
			up, err := net.Dial("tcp", app)
			if err != nil {
				c.Reset()
				return
			}
			flow.Relay(c, flow.FromTCP(up.(*net.TCPConn)))
		},
		"split": func(ctx context.Context, c flow.Stream, app string) {
			m, _ := match.Compile(match.Rule{Headers: []match.Header{{Name: "x-id", Text: match.Text{Op: match.Equal, Value: "lou"}}}})
			Serve(ctx, c, Config{
				Pick: func(h match.Head) string {
					if m.Match(h) {
						return "lou"
					}
					return App
				},
				Rest: func() string { return App },
				Open: func(ctx context.Context, to string) (flow.Stream, error) {
					up, err := net.Dial("tcp", app)
					if err != nil {
						return nil, err
					}
					return flow.FromTCP(up.(*net.TCPConn)), nil
				},
			})
		},
	}
	for _, size := range []int{64, 1 << 20} {
		app := benchServer(b, size)
		for name, fn := range serve {
			b.Run(fmt.Sprintf("%s/%d", name, size), func(b *testing.B) {
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
				c, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				defer c.Close()
				br := bufio.NewReaderSize(c, 64<<10)
				b.SetBytes(int64(size))
				b.ReportAllocs()
				for b.Loop() {
					io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\nAccept: */*\r\nUser-Agent: bench\r\n\r\n")
					r, err := http.ReadResponse(br, nil)
					if err != nil {
						b.Fatal(err)
					}
					io.Copy(io.Discard, r.Body)
					r.Body.Close()
				}
			})
		}
	}
}

func benchServer(b *testing.B, size int) string {
	l := listen(b)
	body := make([]byte, size)
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(size))
		w.Write(body)
	}))
	return l.Addr().String()
}
