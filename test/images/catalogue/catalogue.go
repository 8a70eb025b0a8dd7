// Package catalogue has the container images that tests of a cluster run, and
// builds them: Debian packages and static Go programs, unpacked into one layer,
// written as an archive such as `docker save` writes. It needs apt-get and
// dpkg-deb, and no container engine; images are for linux/amd64.
package catalogue

import (
	"embed"
	"fmt"
	"slices"
)

// Names of the images.
const (
	Nginx    = "nginx"       // nginx, curl and busybox
	Redis    = "redis"       // redis-server, redis-cli and busybox
	Postgres = "postgres"    // PostgreSQL, psql and busybox
	ShopAPI  = "shop-api"    // the API of examples/shop
	Probe    = "probe-tools" // testpod and busybox
)

// References of the images, as pods name them.
const (
	NginxReference    = "signet.example/shop-nginx:1"
	RedisReference    = "signet.example/shop-redis:1"
	PostgresReference = "signet.example/shop-postgres:1"
	ShopAPIReference  = "signet.example/shop-api:1"
	ProbeReference    = "signet.example/testpod:1"
)

// recipe is everything that an image is made of. Any difference in it makes
// another image.
type recipe struct {
	Name, Reference string
	// Packages are Debian's; what they depend on comes along.
	Packages []string
	// Programs are the project's own: path in the image -> package.
	Programs map[string]string
	// Files are written as they are, and may be executed: path -> content.
	Files map[string]string
	// Links are symbolic: path -> target.
	Links map[string]string
	// Folders are made, and are their user's with all that is in them.
	Folders map[string]int
	// User runs the program: a number, since kubelet cannot tell from a name
	// that it is not root.
	User       int
	Entrypoint []string
	Env        []string
}

// Users of the images, with Debian's numbers where Debian has one.
const (
	userWeb      = 33
	userRedis    = 101
	userPostgres = 102
	userNobody   = 65534
)

const passwd = `root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/bin/sh
redis:x:101:101:redis:/var/lib/redis:/bin/sh
postgres:x:102:102:postgres:/var/lib/postgresql:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/bin/sh
`

const group = `root:x:0:
www-data:x:33:
redis:x:101:
postgres:x:102:
nogroup:x:65534:
`

//go:embed entry
var entry embed.FS

func entryFile(name string) string {
	b, err := entry.ReadFile("entry/" + name)
	if err != nil {
		panic(err) // it is embedded
	}
	return string(b)
}

// busybox is a shell, and everything that `kubectl exec` is used for.
const busybox = "busybox-static"

// provided are packages that are left out although others depend on them: they
// set a machine up, and an image is no machine; the compiler of PostgreSQL is
// switched off instead.
var provided = []string{
	"adduser", "debconf", "dpkg", "init-system-helpers", "iproute2", "libjson-perl", "libllvm14", "locales", "locales-all",
	"lsb-base", "netbase", "passwd", "perl", "perl-base", "postgresql-client-common", "postgresql-common",
	"sensible-utils", "ssl-cert", "tzdata", "ucf",
}

const postgresBin = "/usr/lib/postgresql/15/bin"

var recipes = []recipe{
	{
		Name: Nginx, Reference: NginxReference,
		Packages:   []string{"nginx-light", "curl", busybox},
		Files:      map[string]string{"/etc/nginx/nginx.conf": entryFile("nginx.conf")},
		Folders:    map[string]int{"/var/lib/nginx": userWeb},
		User:       userWeb,
		Entrypoint: []string{"/usr/sbin/nginx", "-e", "/dev/stderr", "-g", "daemon off;"},
	}, {
		Name: Redis, Reference: RedisReference,
		Packages:   []string{"redis-server", "redis-tools", busybox},
		Folders:    map[string]int{"/var/lib/redis": userRedis},
		User:       userRedis,
		Entrypoint: []string{"/usr/bin/redis-server", "--dir", "/var/lib/redis", "--save", "", "--bind", "*", "-::*", "--protected-mode", "no"},
	}, {
		Name: Postgres, Reference: PostgresReference,
		Packages: []string{"postgresql-15", busybox},
		Files:    map[string]string{"/usr/local/bin/serve-postgres": entryFile("serve-postgres.sh")},
		// Debian's own wrappers of these are in a package that is left out.
		Links:      map[string]string{"/usr/bin/psql": postgresBin + "/psql", "/usr/bin/pg_isready": postgresBin + "/pg_isready"},
		Folders:    map[string]int{"/var/lib/postgresql": userPostgres, "/run/postgresql": userPostgres},
		User:       userPostgres,
		Entrypoint: []string{"/usr/local/bin/serve-postgres"},
		Env:        []string{"PGDATA=/var/lib/postgresql/data", "LANG=C.UTF-8"},
	}, {
		Name: ShopAPI, Reference: ShopAPIReference,
		Programs:   map[string]string{"/usr/bin/api": "./examples/shop/api"},
		User:       userNobody,
		Entrypoint: []string{"/usr/bin/api"},
	}, {
		Name: Probe, Reference: ProbeReference,
		Packages:   []string{busybox},
		Programs:   map[string]string{"/usr/bin/testpod": "./test/images/testpod"},
		User:       userNobody,
		Entrypoint: []string{"/usr/bin/testpod"},
	},
}

// Names returns the names of all images.
func Names() []string {
	var names []string
	for _, r := range recipes {
		names = append(names, r.Name)
	}
	return names
}

// choose returns the recipes with these names, all for none.
func choose(names []string) ([]recipe, error) {
	if len(names) == 0 {
		return recipes, nil
	}
	var chosen []recipe
	for _, name := range names {
		i := slices.IndexFunc(recipes, func(r recipe) bool { return r.Name == name })
		if i < 0 {
			return nil, fmt.Errorf("there is no image %q; there are %q", name, Names())
		}
		chosen = append(chosen, recipes[i])
	}
	return chosen, nil
}
