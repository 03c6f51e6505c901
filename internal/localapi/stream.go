package localapi

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// streamProtocol is what a connection of this API becomes when it carries a stream (RFC 9110, section 7.8).
const streamProtocol = "doppel-stream"

// Stream carries bytes of something else than this API.
type Stream interface {
	io.ReadWriteCloser
	// CloseWrite ends this direction; the other stays open.
	CloseWrite() error
}

// HandleStream makes an HTTP handler that joins its client with the stream that open returns, until that ends or the client is gone.
func HandleStream[Req any](open func(context.Context, Req) (Stream, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req Req
		if !decode(w, r, &req) {
			return
		}
		st, err := open(r.Context(), req)
		if err != nil {
			_ = json.NewEncoder(w).Encode(Event{Error: uerr.From(err)})
			return
		}
		defer st.Close()
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, "HTTP/1.1 is required", http.StatusHTTPVersionNotSupported)
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Time{}) // the HTTP server's
		if _, err := io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+streamProtocol+"\r\n\r\n"); err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(st, buf.Reader)
			_ = st.CloseWrite()
		}()
		_, _ = io.Copy(conn, st)
	})
}

// Stream sends req to a method and returns the stream that the connection becomes. ctx bounds the request alone.
func (c *Client) Stream(ctx context.Context, method string, req any) (Stream, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://daemon/v1/"+method, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	conn, err := c.dial(ctx)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrNoDaemon
	}
	if err != nil {
		return nil, err
	}
	cut := context.AfterFunc(ctx, func() { _ = conn.Close() })
	in := bufio.NewReader(conn)
	err = hr.Write(conn)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(in, hr) //nolint:bodyclose // it is the connection
	}
	switch {
	case err != nil:
		err = broken(ctx, err)
	case resp.StatusCode != http.StatusSwitchingProtocols:
		err = refusal(ctx, method, resp)
	case cut():
		return &stream{conn.(*net.UnixConn), in}, nil
	default:
		err = context.Cause(ctx)
	}
	_ = conn.Close()
	return nil, err
}

// refusal is why there is no stream.
func refusal(ctx context.Context, method string, resp *http.Response) error {
	if err := check(method, resp); err != nil {
		return err
	}
	if err := broken(ctx, readEvents(resp.Body, nil, nil)); err != nil {
		return err
	}
	return fmt.Errorf("the user daemon answered %s without a stream", method)
}

// stream is a connection of which some bytes may have been read already.
type stream struct {
	*net.UnixConn
	in *bufio.Reader
}

func (s *stream) Read(p []byte) (int, error) { return s.in.Read(p) }

// WriteTo keeps io.Copy from passing by what has been read.
func (s *stream) WriteTo(w io.Writer) (int64, error) { return s.in.WriteTo(w) }
