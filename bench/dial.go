package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"
)

const (
	rawProtocol = "bench"
	dialTimeout = 10 * time.Second
)

// rawWay is what the bare way through the API server needs: whom to ask, as whom, and for what.
type rawWay struct {
	Server        string // HOST:PORT
	CA, Cert, Key []byte // PEM
	Path          string // of the service's proxy, without the port
}

// dialer connects to one of the server's ports.
type dialer func(port int) (net.Conn, error)

// plain connects to an address; add is what the server's ports are more there.
func plain(addr string, add int) dialer {
	d := net.Dialer{Timeout: dialTimeout}
	return func(port int) (net.Conn, error) { return d.Dial("tcp", net.JoinHostPort(addr, fmt.Sprint(port+add))) }
}

// plainTLS connects to the port beside it that speaks TLS 1.3.
func plainTLS(addr string) dialer {
	dial := plain(addr, addTLS)
	return func(port int) (net.Conn, error) {
		c, err := dial(port)
		if err != nil {
			return nil, err
		}
		return tls.Client(c, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}), nil // it is the cost that counts here
	}
}

// raw connects by one upgraded request through the API server's service proxy, with nothing inside: the limit of that way.
func raw(file string) (dialer, error) {
	way, cfg, err := readRaw(file)
	if err != nil {
		return nil, err
	}
	return func(port int) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
		defer cancel()
		c, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", way.Server)
		if err != nil {
			return nil, err
		}
		if _, err := fmt.Fprintf(c, "GET %s/%d HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", way.Path, port, way.Server, rawProtocol); err != nil {
			return nil, err
		}
		r := bufio.NewReader(c)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			return nil, err
		}
		_ = resp.Body.Close() // an upgrade has none
		if resp.StatusCode != http.StatusSwitchingProtocols {
			return nil, fmt.Errorf("upgrade: %s", resp.Status)
		}
		return &readConn{c, r}, nil
	}, nil
}

// readRaw reads a rawWay, and makes TLS's part of it.
func readRaw(file string) (rawWay, *tls.Config, error) {
	var way rawWay
	text, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(text, &way)
	}
	if err != nil {
		return way, nil, err
	}
	cert, err := tls.X509KeyPair(way.Cert, way.Key)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(way.CA)
	return way, &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}}, err
}

// resolver is the first of resolv.conf.
func resolver() (netip.AddrPort, error) {
	text, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		return netip.AddrPort{}, err
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "nameserver" {
			a, err := netip.ParseAddr(f[1])
			return netip.AddrPortFrom(a, 53), err
		}
	}
	return netip.AddrPort{}, fmt.Errorf("no nameserver in resolv.conf")
}
